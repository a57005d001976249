"""What the operator keeps of the objects it watches, and under what it finds them again.

`handlers` gives these to its reflectors. Each projection leaves out what nobody reads: with thousands of jobs that is
most of a process's memory. Each is total: whatever the API server holds, it has a view.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from finetune_api.spec.lifecycle import MANAGER
from finetune_operator import names
from finetune_operator.policies.dependencies import dependency_names
from finetune_operator.raw import Document, at, only
from finetune_operator.states import project_ray_job_status

__all__ = [
    "BY_JOB",
    "BY_RUNTIME",
    "NEEDED_BY",
    "is_ours",
    "job_indexers",
    "owned_indexers",
    "project_config_map",
    "project_object",
    "project_ray_job",
    "runtime_name",
]

BY_JOB = "job"
"""Index of what belongs to a job, by namespace/name of the job."""
BY_RUNTIME = "runtime"
"""Index of jobs by the name of their runtime."""
NEEDED_BY = "needs"
"""Index of jobs by namespace/name of a job whose artifact they need."""

_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_RAY_JOB_METADATA = (
    *("name", "namespace", "uid", "resourceVersion", "labels", "ownerReferences"),
    *("creationTimestamp", "deletionTimestamp"),
)


def is_ours(job: Document) -> bool:
    """Whether this operator looks after the job, rather than the one that `managedBy` names."""
    return at(job, "spec", "managedBy") in (None, MANAGER)


def runtime_name(job: Document) -> str | None:
    """The runtime that the job names."""
    name = at(job, "spec", "runtimeRef", "name")
    return name if isinstance(name, str) else None


def job_indexers() -> dict[str, Any]:
    """Where a FineTuneJob is found."""

    def by_runtime(job: Document) -> Iterable[str]:
        name = runtime_name(job)
        return () if name is None else (name,)

    def needed_by(job: Document) -> Iterable[str]:
        return [f"{job['metadata'].get('namespace', '')}/{name}" for name in dependency_names(job)]

    return {BY_RUNTIME: by_runtime, NEEDED_BY: needed_by}


def owned_indexers() -> dict[str, Any]:
    """Where an object that belongs to a job is found."""

    def by_job(document: Document) -> Iterable[str]:
        job = names.job_of(at(document, "metadata", "labels"))
        return () if job is None else (f"{document['metadata'].get('namespace', '')}/{job}",)

    return {BY_JOB: by_job}


def project_object(document: Document) -> Document:
    """The object without who set which field of it, and without the copy of itself that kubectl keeps in it."""
    metadata = document["metadata"]
    kept = {name: value for name, value in metadata.items() if name != "managedFields"}
    annotations = metadata.get("annotations")
    if isinstance(annotations, Mapping) and _APPLIED in annotations:
        kept["annotations"] = {name: value for name, value in annotations.items() if name != _APPLIED}
    return {**document, "metadata": kept}


def project_ray_job(document: Document) -> Document:
    """Identity, spec.suspend, and of the status what `states.read_ray_job` reads."""
    kept = only(document["metadata"], *_RAY_JOB_METADATA)
    annotations = only(at(document, "metadata", "annotations"), names.DIGEST_ANNOTATION)
    return {
        "metadata": {**kept, "annotations": annotations} if annotations else kept,
        "spec": only(at(document, "spec"), "suspend"),
        "status": project_ray_job_status(at(document, "status")),
    }


def project_config_map(document: Document) -> Document:
    """Runtime and progress whole; of a plan only that it is there: it is written once and read by the trainers."""
    kept = project_object(document)
    if str(document["metadata"]["name"]).endswith("-plan"):
        kept.pop("data", None)
    return kept
