"""From what a person hands over (a file, a mapping, a model) to jobs, and from a job to what a cluster is sent.

Used by `client` and by the backends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.base import API_VERSION
from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.manifests import load_manifests, with_absolute_paths
from finetune_api.problems import InvalidManifest, shorten, validate_document
from finetune_api.runtime import FineTuneRuntime
from finetune_client.errors import NoSuchJob
from finetune_client.loading import misfits_among
from finetune_operator.kinds import Key

__all__ = ["Handed", "Submission", "check_namespace", "checked", "document_of", "handed_over"]

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""What Kubernetes takes; a job that was made by other hands may have a name that we would not give."""
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
    if unfit := misfits_among(found.jobs):
        raise InvalidManifest(unfit)
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


def checked(key: Key) -> Key:
    """The key, where it can be one: of nothing, or of a path, a server would make something else. Raises NoSuchJob."""
    for what, text in (("job", key.name), ("namespace", key.namespace)):
        if not _NAME.fullmatch(text):
            right = "those are lower-case letters, digits and '-', such as support-bot"
            raise NoSuchJob(f"{shorten(text)} is not the name of a {what}; {right}")
    return key


def check_namespace(job: FineTuneJob, asked: str | None) -> None:
    """A namespace in the file and another on the command line: one of them is a mistake. Raises InvalidManifest."""
    own = job.metadata.namespace if "namespace" in job.metadata.model_fields_set else None
    if own is not None and asked is not None and own != asked:
        message = f"is not the namespace that was asked for, {asked}; remove one of the two"
        raise InvalidManifest([Problem(path="metadata.namespace", value=f'"{own}"', message=message)])
