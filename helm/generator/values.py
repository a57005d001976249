"""Reads the chart's values.yaml together with its comments: what each value is, and what it may be.

Called by `schema` and `readme`, which are two views of the same. A value's documentation is the comment right above
it; a line in it that begins with @schema adds to the JSON schema that its default implies. A mapping without a comment
is a group of values. `## Title` begins a section.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

__all__ = ["Group", "Section", "Value", "ValuesError", "read_values"]

_MARK = "@schema "
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


class ValuesError(ValueError):
    """Values that lack a sentence or a type; the message lists all of them."""


@dataclass(frozen=True)
class Value:
    """Something to set: `path` from the top, its default, a sentence or two, and the JSON schema."""

    path: tuple[str, ...]
    default: Any
    says: str
    schema: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """A mapping that only holds values."""

    path: tuple[str, ...]
    members: tuple[Value | Group, ...]

    def values(self) -> Iterator[Value]:
        """All values below, in the order of the file."""
        for member in self.members:
            if isinstance(member, Value):
                yield member
            else:
                yield from member.values()


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    members: tuple[Value | Group, ...]

    def values(self) -> Iterator[Value]:
        """All values below, in the order of the file."""
        yield from Group((), self.members).values()


def read_values(text: str) -> tuple[Section, ...]:
    """The sections of a values.yaml. Raises ValuesError when a value is not documented or has no type."""
    root, reader = yaml.compose(text, Loader=yaml.SafeLoader), _Reader(text.splitlines())
    assert isinstance(root, yaml.MappingNode)
    members: dict[str, list[Value | Group]] = {}
    for key, node in root.value:
        members.setdefault(reader.section(key), []).append(reader.member((), key, node))
    if reader.faults:
        raise ValuesError("\n".join(reader.faults))
    return tuple(Section(title, tuple(found)) for title, found in members.items())


class _Reader:
    """Finds the comments that belong to a node."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self.faults: list[str] = []

    def section(self, key: yaml.Node) -> str:
        """The heading above a top-level key."""
        above = (line for line in reversed(self._lines[: key.start_mark.line]) if line.startswith("## "))
        return next(above, "## ").removeprefix("## ")

    def member(self, parents: tuple[str, ...], key: yaml.Node, node: yaml.Node) -> Value | Group:
        path = (*parents, str(key.value))
        comment = self._comment(key.start_mark.line)
        if not comment and isinstance(node, yaml.MappingNode) and node.value:
            return Group(path, tuple(self.member(path, *pair) for pair in node.value))
        default = yaml.SafeLoader("").construct_document(node)
        says = " ".join(line for line in comment if not line.startswith(_MARK))
        schema = self._schema(path, default, [line for line in comment if line.startswith(_MARK)])
        if not says.endswith("."):
            self._fault(path, "has no sentence above it")
        return Value(path, default, says, schema)

    def _comment(self, line: int) -> list[str]:
        """The lines of comment right above `line`, without their marks."""
        found: list[str] = []
        while line > 0 and self._lines[line - 1].lstrip().startswith("# "):
            line -= 1
            found.insert(0, self._lines[line].strip().removeprefix("# "))
        return found

    def _schema(self, path: tuple[str, ...], default: Any, marked: list[str]) -> dict[str, Any]:
        added: dict[str, Any] = {}
        for line in marked:
            added |= yaml.safe_load(line.removeprefix(_MARK))
        if isinstance(default, list | dict) and not added:
            self._fault(path, "is a list or a mapping: an @schema line must say of what")
        if not {"$ref", "enum", "type"} & added.keys():
            added = {"type": _TYPES[type(default)], **added}
        return added

    def _fault(self, path: tuple[str, ...], what: str) -> None:
        self.faults.append(f"{'.'.join(path)} {what}")
