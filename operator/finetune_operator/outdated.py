"""A CRD that is older than the operator: the API server then drops, without a word, what its schema does not have.

The reconcile pass compares what it wrote with what the server kept. What people write is refused at the door instead:
kubectl and our client ask for strict validation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["OUTDATED_CRD", "dropped_fields", "outdated_message"]

OUTDATED_CRD = "OutdatedCRD"
"""Reason of the Event."""


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


def outdated_message(fields: list[str]) -> str:
    """What is wrong, and what to do."""
    return (
        f"This cluster's CRD of FineTuneJobs is older than the operator, and does not keep {', '.join(fields)}. "
        "Bring it to the operator's version: `helm upgrade` with its chart, or "
        "`kubectl apply --server-side -f manifests/crd`."
    )
