"""A CRD of another version than the operator: its schema does not have, or does not take, what the operator writes.

The API server drops fields that the schema does not have, without a word, and refuses a status with values that it does
not allow. The reconcile pass compares what it wrote with what the server kept, and writes what is refused without the
fields that the server names: a job must be able to go on, and to end. Condition StatusKept tells of both. What people
write is refused at the door instead: kubectl and our client ask for strict validation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from finetune_operator.conditions import Finding

__all__ = ["OUTDATED_CRD", "dropped_fields", "is_there", "outdated_message", "place_of", "status_kept"]

OUTDATED_CRD = "OutdatedCRD"
"""Reason of the condition and of the Event."""

_STEP = re.compile(r"\[([^\]]*)\]|[^.\[\]]+")


def dropped_fields(sent: Any, kept: Any, path: str = "status") -> Iterator[str]:
    """Paths of fields of `sent` that `kept`, the same object as the server answers with, does not have."""
    if sent == kept:
        return
    if isinstance(sent, dict):
        for name, value in sent.items():
            if isinstance(kept, dict) and name in kept:
                yield from dropped_fields(value, kept[name], f"{path}.{name}")
            elif value is not None:
                yield f"{path}.{name}"
    elif isinstance(sent, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(sent, kept, strict=False)):
            yield from dropped_fields(one, other, f"{path}[{number}]")


def place_of(path: str) -> tuple[int | str, ...]:
    """Where below the status a path leads, as the server writes it: status.conditions[0].reason."""
    steps = [one.group(1) if one.group(1) is not None else one.group() for one in _STEP.finditer(path)]
    return tuple(int(step) if step.isdecimal() else step for step in steps[1:])


def is_there(path: str, status: Any) -> bool:
    """Whether something stands at `path` in `status`."""
    for step in place_of(path):
        try:
            status = status[step]
        except (IndexError, KeyError, TypeError):
            return False
    return True


def status_kept(unkept: Iterable[str]) -> Finding:
    """Whether the cluster keeps all of the status that is written."""
    fields = list(unkept)
    if fields:
        return Finding("StatusKept", "False", OUTDATED_CRD, outdated_message(fields))
    return Finding("StatusKept", "True", "Kept", "The cluster keeps all of the status.")


def outdated_message(fields: list[str]) -> str:
    """What is wrong, and what to do."""
    return (
        f"This cluster's CRD of FineTuneJobs is older than the operator, and does not keep {', '.join(fields)}. "
        "Bring it to the operator's version: `helm upgrade` with its chart, or "
        "`kubectl apply --server-side -f manifests/crd`."
    )
