"""When the cluster will not have an object that a job needs: what the job's status then says, and for how long to wait.

Pure; called by the reconcile pass. Such a refusal is nobody's crash: somebody must install something, free a name, or
raise a quota, and the condition says so. Asking again in a hurry would change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_operator.errors import ApiError, Forbidden, NotFound
from finetune_operator.kinds import FINETUNE_JOB, RAY_JOB, Kind
from finetune_operator.raw import at, items
from finetune_operator.status import in_brief

__all__ = ["KUBERAY_MISSING", "Refusal", "is_left_over", "name_taken", "refusal_of", "refused_status", "was_refused"]

Document = dict[str, Any]

_CONDITION = "ClusterReady"
_LONGEST_MESSAGE = 4096
_REASONS = frozenset({"Forbidden", "KubeRayMissing", "NameTaken", "NamespaceTerminating", "Refused"})
_UNDONE = ("attempts", "rayJob", "nextAttemptAt", "phase")
"""What a decision says in the belief that its objects were created."""


@dataclass(frozen=True)
class Refusal:
    """Why an object was not created. `wait` is how many seconds until it is worth asking again."""

    reason: str
    message: str
    wait: float


KUBERAY_MISSING = Refusal(
    "KubeRayMissing",
    "This cluster does not know RayJobs. Install KubeRay, for instance with `helm install kuberay-operator "
    "kuberay-operator --repo https://ray-project.github.io/kuberay-helm`; the job then starts by itself.",
    wait=60,
)


def refusal_of(error: ApiError, kind: Kind, name: str) -> Refusal | None:
    """What to make of the answer to a create; None for one that is worth trying again soon."""
    if isinstance(error, NotFound):
        return KUBERAY_MISSING if kind == RAY_JOB else None
    if isinstance(error, Forbidden):
        if "being terminated" in error.message:
            return Refusal("NamespaceTerminating", f"The namespace is being deleted: {error.message}", wait=60)
        return Refusal(
            "Forbidden",
            f"{kind.name} {name} may not be created: {error.message}. Raise the quota, or let the operator create it.",
            wait=300,
        )
    if error.status in (400, 413, 422):
        return Refusal("Refused", f"{kind.name} {name} was refused: {error.message}", wait=300)
    return None


def is_left_over(there: Document, job: Document) -> bool:
    """Whether an object is on its way out: being deleted, or of a job that had this job's name before."""
    metadata, name, uid = there["metadata"], job["metadata"]["name"], job["metadata"].get("uid")
    owners: Iterable[Document] = metadata.get("ownerReferences") or ()
    namesakes = [one for one in owners if one.get("kind") == FINETUNE_JOB.name and one.get("name") == name]
    return metadata.get("deletionTimestamp") is not None or any(one.get("uid") != uid for one in namesakes)


def name_taken(kind: Kind, there: Document, job: Document) -> Refusal:
    """An object that is not the job's has the name that one of the job's must have."""
    what = f"{kind.name} {there['metadata']['name']}"
    if is_left_over(there, job):
        return Refusal("NameTaken", f"{what} is left from an earlier job and must be deleted first.", wait=2)
    return Refusal("NameTaken", f"{what} exists and is not this job's: delete it, or give the job another name.", 60)


def refused_status(
    before: Document | None, decided: Document | None, refusal: Refusal, job: Document, now: datetime
) -> Document | None:
    """The status that says so: `decided`, without what would only hold had the object been created.

    `before` is the status as it stands; None is returned where it says all this already.
    """
    before = before or {}
    status = dict(decided if decided is not None else before)
    for name in _UNDONE:
        status.pop(name, None)
        if name in before:
            status[name] = before[name]
    status.setdefault("phase", "Pending")
    status |= {"reason": refusal.reason, "message": in_brief(refusal.message)}
    status["conditions"] = _with(status.get("conditions") or [], before.get("conditions") or [], refusal, job, now)
    return status if status != before else None


def was_refused(status: object) -> bool:
    """Whether the status says that the cluster would not have something."""
    found = (one for one in items(status, "conditions") if at(one, "type") == _CONDITION)
    return any(at(one, "status") == "False" and at(one, "reason") in _REASONS for one in found)


def _with(
    listed: list[Document], before: list[Document], refusal: Refusal, job: Document, now: datetime
) -> list[Document]:
    earlier = next((one for one in before if one.get("type") == _CONDITION), None)
    lasting = earlier is not None and earlier.get("status") == "False"
    condition: Document = {
        "type": _CONDITION,
        "status": "False",
        "reason": refusal.reason,
        "message": refusal.message[:_LONGEST_MESSAGE],
        "lastTransitionTime": earlier["lastTransitionTime"]
        if earlier and lasting
        else now.isoformat().replace("+00:00", "Z"),
    }
    generation = job["metadata"].get("generation")
    if generation is not None:
        condition["observedGeneration"] = generation
    replaced = [condition if one.get("type") == _CONDITION else one for one in listed]
    return replaced if condition in replaced else [*replaced, condition]
