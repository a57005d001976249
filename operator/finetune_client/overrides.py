"""`--set training.maxSteps=5`: changes to a job's spec from the command line, made before it is validated.

Called by the CLI. The value is read as YAML, so that it has the type it would have in the file; `null` removes the
field. Setting one of several alternatives (epochs or maxSteps, full or lora or freeze) removes the others.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.failures import Problem
from finetune_api.manifests import read_documents
from finetune_api.problems import InvalidManifest, shorten

__all__ = ["Override", "apply_overrides", "parse_override"]

_ALTERNATIVES = {
    ("training",): ("epochs", "maxSteps"),
    ("tuning",): ("full", "lora", "freeze"),
}
_FORM = "write it as FIELD=VALUE, such as training.maxSteps=5"


@dataclass(frozen=True)
class Override:
    """One field of the spec and its new value; None removes it."""

    path: tuple[str | int, ...]
    value: Any

    def __str__(self) -> str:
        return "spec." + ".".join(map(str, self.path))


def parse_override(text: str) -> Override:
    """Read FIELD=VALUE. Raises InvalidManifest."""
    name, equals, value = text.partition("=")
    steps = name.strip().removeprefix("spec.").replace("[", ".").replace("]", "").split(".")
    if not equals or not all(steps):
        raise _refused(None, text, _FORM)
    documents = read_documents(value, f"--set {name.strip()}")
    path = tuple(int(step) if step.isdigit() else step for step in steps)
    return Override(path, _from_here(documents[0]) if documents else None)


def apply_overrides(document: Any, overrides: Sequence[Override]) -> Any:
    """`document` with the overrides in its spec, when it is a FineTuneJob. Raises InvalidManifest."""
    if not isinstance(document, dict) or document.get("kind") != "FineTuneJob":
        return document
    changed = copy.deepcopy(document)
    for override in overrides:
        _remove_alternatives(changed.get("spec"), override, overrides)
        _set(changed.setdefault("spec", {}), override)
    return changed


def _set(node: Any, override: Override) -> None:
    *parents, last = override.path
    for step in parents:
        if isinstance(node, dict) and isinstance(step, str) and node.get(step) is None:
            node[step] = {}
        _check_step(node, step, override)
        node = node[step]
    if isinstance(node, dict) and override.value is None:
        node.pop(last, None)
        return
    _check_step(node, last, override, adding=True)
    node[last] = override.value


def _check_step(node: Any, step: str | int, override: Override, adding: bool = False) -> None:
    """`step` must lead somewhere in `node`: a name in a mapping, an index in a list."""
    if isinstance(node, dict) and isinstance(step, str) and (adding or step in node):
        return
    if isinstance(node, list) and isinstance(step, int) and step < len(node):
        return
    if isinstance(node, list):
        raise _refused(str(override), str(step), f"must be an index below {len(node)}, the length of the list")
    raise _refused(str(override), str(step), f"leads nowhere: {shorten(node)} has no fields")


def _remove_alternatives(spec: Any, override: Override, overrides: Sequence[Override]) -> None:
    if override.value is None or not isinstance(spec, dict):
        return
    for parents, names in _ALTERNATIVES.items():
        depth = len(parents)
        if override.path[:depth] != parents or len(override.path) == depth or override.path[depth] not in names:
            continue
        asked_for = {
            other.path[depth] for other in overrides if len(other.path) > depth and other.path[:depth] == parents
        }
        node = spec.get(parents[0])
        for name in names:
            if isinstance(node, dict) and name not in asked_for:
                node.pop(name, None)


def _from_here(value: Any) -> Any:
    """A relative file on the command line is relative to the folder one is in, not to the manifest's."""
    if isinstance(value, str) and value.startswith("file://."):
        return f"file://{Path.cwd().joinpath(value.removeprefix('file://')).as_posix()}"
    if isinstance(value, list):
        return [_from_here(item) for item in value]
    if isinstance(value, dict):
        return {key: _from_here(item) for key, item in value.items()}
    return value


def _refused(path: str | None, value: str, message: str) -> InvalidManifest:
    return InvalidManifest([Problem(file="--set", path=path, value=shorten(value), message=message)])
