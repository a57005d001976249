"""From what a person hands over (a file, a mapping, a model) to jobs, and from a job to what a cluster is sent.

Used by `client` and by the backends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.base import API_VERSION
from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.manifests import load_manifests, with_absolute_paths
from finetune_api.problems import InvalidManifest, validate_document
from finetune_api.runtime import FineTuneRuntime

__all__ = ["Handed", "Submission", "check_namespace", "document_of", "handed_over"]

_GIVEN_BY_THE_CLUSTER = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid")

Submission = FineTuneJob | Mapping[str, Any] | Path | str
"""A job as a model, as plain values, or the file in which it is. A `file://./path` is taken from the file's folder, and
where there is none from the working directory."""


@dataclass(frozen=True)
class Handed:
    """Jobs and the runtimes that came with them."""

    jobs: Sequence[FineTuneJob]
    runtimes: Sequence[FineTuneRuntime] = field(default_factory=tuple)


def handed_over(given: Submission | Sequence[Path]) -> Handed:
    """The jobs in it, checked as far as this machine can. Raises InvalidManifest."""
    if isinstance(given, FineTuneJob | Mapping):
        job = given if isinstance(given, FineTuneJob) else validate_document(FineTuneJob, dict(given))
        return Handed([with_absolute_paths(job, document_of(job), Path.cwd())])
    paths = [Path(given)] if isinstance(given, str | Path) else [Path(one) for one in given]
    found = load_manifests(*paths)
    if not found.jobs:
        raise InvalidManifest([Problem(file=str(paths[0]), message="holds no FineTuneJob")])
    return Handed([one.job for one in found.jobs], list(found.runtimes.values()))


def document_of(job: FineTuneJob) -> dict[str, Any]:
    """The object as its author wrote it: what was left open stays open, for the cluster's own defaults.

    An operator that is older than this client so hears nothing of fields that nobody has asked for.
    """
    document = job.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True)
    document.pop("status", None)
    for name in _GIVEN_BY_THE_CLUSTER:  # of a job that was read from one, to be submitted again
        document["metadata"].pop(name, None)
    return {"apiVersion": API_VERSION, "kind": "FineTuneJob", **document}


def check_namespace(job: FineTuneJob, asked: str | None) -> None:
    """A namespace in the file and another on the command line: one of them is a mistake. Raises InvalidManifest."""
    own = job.metadata.namespace if "namespace" in job.metadata.model_fields_set else None
    if own is not None and asked is not None and own != asked:
        message = f"is not the namespace that was asked for, {asked}; remove one of the two"
        raise InvalidManifest([Problem(path="metadata.namespace", value=f'"{own}"', message=message)])
