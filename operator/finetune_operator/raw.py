"""Reading documents that anybody may have written: what is missing, or of another type, reads as nothing.

Used wherever an object is looked at before it is validated. Nothing but `key_of` raises, whatever the API server holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_operator.kinds import Key

__all__ = ["Document", "at", "controller_uid", "items", "key_of", "only", "text", "version_of"]

Document = dict[str, Any]


def at(value: Any, *path: str) -> Any:
    """What is at `path` below `value`, or None."""
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def text(value: Any, *path: str) -> str:
    """The text at `path` below `value`; empty where there is none."""
    found = at(value, *path)
    return found if isinstance(found, str) else ""


def items(value: Any, key: str) -> Iterator[Any]:
    """The entries of the list under `key`; none where there is no list."""
    found = at(value, key)
    return iter(found if isinstance(found, list) else ())


def only(value: Any, *keys: str) -> Document:
    """`value` with only those of `keys` that it has."""
    return {key: value[key] for key in keys if key in value} if isinstance(value, dict) else {}


def controller_uid(document: Any) -> str | None:
    """The uid of the object that controls this one."""
    owners = (owner for owner in items(at(document, "metadata"), "ownerReferences") if at(owner, "controller") is True)
    return next((text(owner, "uid") or None for owner in owners), None)


def key_of(document: Document) -> Key:
    """The key of an object; KeyError where it has no name."""
    metadata = document["metadata"]
    return Key(metadata.get("namespace") or "", metadata["name"])


def version_of(document: Document) -> str:
    """The object's resourceVersion, an opaque word; empty where it has none."""
    return str(document.get("metadata", {}).get("resourceVersion") or "")
