"""What every child of a job has in common: its kind, name, namespace, labels and its one owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator import names
from finetune_operator.kinds import FINETUNE_JOB, Kind

__all__ = ["Document", "Owner", "child"]

Document = dict[str, Any]


@dataclass(frozen=True)
class Owner:
    """The FineTuneJob that a child belongs to and goes with: deleting the job deletes its children."""

    name: str
    namespace: str
    uid: str

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Owner:
        """The owner that a FineTuneJob, as the API server has it, is to its children."""
        metadata = job["metadata"]
        return cls(metadata["name"], metadata["namespace"], metadata["uid"])

    def reference(self) -> Document:
        """The owner reference. It names the controller, so that nobody else adopts the child."""
        return {
            "apiVersion": FINETUNE_JOB.api_version,
            "kind": FINETUNE_JOB.name,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def child(
    kind: Kind,
    owner: Owner,
    name: str,
    content: Mapping[str, Any],
    *,
    attempt: int | None = None,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Document:
    """An object of `kind` that belongs to the job, or to one `attempt` of it; `content` is all but its metadata."""
    own = names.job_labels(owner.name) if attempt is None else names.attempt_labels(owner.name, attempt)
    metadata: Document = {
        "name": name,
        "namespace": owner.namespace,
        "labels": {**(labels or {}), **own},
        "ownerReferences": [owner.reference()],
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **content}
