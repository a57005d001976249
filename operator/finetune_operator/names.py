"""Every name and label that the operator writes. Deterministic: the same job and attempt always give the same names.

Used by the builders in `resources`, by `observe` and `states` to read labels back, and by the handlers to select.
A job's name has at most 40 characters: with an attempt's number it stays within the 47 of a RayJob's name, to which
KubeRay itself appends for the RayCluster's.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "APP",
    "ARTIFACTS_ANNOTATION",
    "ATTEMPT_LABEL",
    "DIGEST_ANNOTATION",
    "HEAD",
    "JOB_LABEL",
    "MANAGED_BY",
    "MANAGED_BY_LABEL",
    "OUTPUTS_ANNOTATION",
    "NAME_LABEL",
    "RAY_CONTAINER",
    "RAY_JOB_NAME_LENGTH",
    "ROLE_LABEL",
    "SCRATCH",
    "SUBMITTER",
    "WORKER",
    "attempt_from",
    "attempt_labels",
    "attempt_of",
    "disruption_budget",
    "job_labels",
    "job_of",
    "job_selector",
    "managed_selector",
    "network_policy",
    "plan_config_map",
    "pod_labels",
    "progress_config_map",
    "ray_job",
    "runtime_config_map",
    "trainer_account",
]

RAY_JOB_NAME_LENGTH = 47
"""KubeRay refuses longer names: it appends six characters for the RayCluster, and that name ends up in Services'."""

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "finetune-operator"
NAME_LABEL = "app.kubernetes.io/name"
APP = "finetunejob"
JOB_LABEL = "finetune-operator.io/job"
ATTEMPT_LABEL = "finetune-operator.io/attempt"
ROLE_LABEL = "finetune-operator.io/role"

DIGEST_ANNOTATION = "finetune-operator.io/digest"
"""On a plan's ConfigMap: of its contents, which the operator does not keep in memory."""
ARTIFACTS_ANNOTATION = "finetune-operator.io/artifacts"
"""On a plan's ConfigMap: what other jobs wrote that it was planned with, as JSON by their names."""
OUTPUTS_ANNOTATION = "finetune-operator.io/outputs"
"""On a plan's ConfigMap: the outputs that the attempt writes, as JSON; the job's own may be edited meanwhile."""

HEAD = "head"
WORKER = "worker"
SUBMITTER = "submitter"
"""Of pods that KubeRay may start to submit the entrypoint; attempts are submitted without one (`resources.rayjob`)."""

RAY_CONTAINER = "ray"
"""The container of every pod in which Ray runs."""
SCRATCH = "/var/finetune"
"""A folder of each pod's own, which goes with the pod; it is also the home folder."""

_ATTEMPT = re.compile(r"[1-9][0-9]{0,8}")


def ray_job(job: str, attempt: int) -> str:
    """The RayJob of one attempt."""
    return f"{job}-{attempt}"


def plan_config_map(job: str, attempt: int) -> str:
    """The ConfigMap with the RunPlan of one attempt."""
    return plan_of(ray_job(job, attempt))


def plan_of(ray_job: str) -> str:
    """The same, by the name of the attempt's RayJob."""
    return f"{ray_job}-plan"


def runtime_config_map(job: str) -> str:
    """The ConfigMap with the runtime as it was when the job was accepted."""
    return f"{job}-runtime"


def progress_config_map(job: str) -> str:
    """The ConfigMap that the trainers report into."""
    return f"{job}-progress"


def trainer_account(job: str) -> str:
    """The ServiceAccount of the job's pods, its Role and its RoleBinding."""
    return f"{job}-trainer"


def network_policy(job: str) -> str:
    """The NetworkPolicy around all pods of the job."""
    return job


def disruption_budget(job: str) -> str:
    """The PodDisruptionBudget over all pods of the job."""
    return job


def job_labels(job: str) -> dict[str, str]:
    """On every object that belongs to a job."""
    return {MANAGED_BY_LABEL: MANAGED_BY, NAME_LABEL: APP, JOB_LABEL: job}


def attempt_labels(job: str, attempt: int) -> dict[str, str]:
    """On every object that belongs to one attempt."""
    return job_labels(job) | {ATTEMPT_LABEL: str(attempt)}


def pod_labels(job: str, attempt: int, role: str) -> dict[str, str]:
    """On every pod; `role` is HEAD or WORKER."""
    return attempt_labels(job, attempt) | {ROLE_LABEL: role}


def job_selector(job: str) -> dict[str, str]:
    """Labels that select all pods of a job, and no others."""
    return {JOB_LABEL: job}


def managed_selector() -> str:
    """Label selector, in the API's own form, of every object that the operator has made."""
    return f"{MANAGED_BY_LABEL}={MANAGED_BY},{JOB_LABEL}"


def job_of(labels: Any) -> str | None:
    """The job that an object with these labels belongs to; None when they name none, or are no labels."""
    value = labels.get(JOB_LABEL) if isinstance(labels, dict) else None
    return value if isinstance(value, str) and value else None


def attempt_of(labels: Any) -> int | None:
    """The attempt that an object with these labels belongs to; None when they name none, or are no labels."""
    return attempt_from(labels.get(ATTEMPT_LABEL)) if isinstance(labels, dict) else None


def attempt_from(text: Any) -> int | None:
    """An attempt's number as it is written in labels and ConfigMaps: decimal, from 1; None for anything else."""
    return int(text) if isinstance(text, str) and _ATTEMPT.fullmatch(text) else None
