"""What others write, read into types: RayJobs by KubeRay, pods by the kubelet, the progress ConfigMap by the trainers.

Total: no document makes these functions raise, whatever it holds. What is missing, of the wrong type or beyond belief
reads as absent. `observe` and the policies see these types and never a raw status.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from finetune_api.base import Contract
from finetune_api.progress import Outcome, Progress
from finetune_operator import names
from finetune_operator.raw import Document, at, controller_uid, items, only, text
from finetune_operator.times import sane

__all__ = [
    "ATTEMPT_KEY",
    "OUTCOME_ATTEMPT_KEY",
    "OUTCOME_KEY",
    "PROGRESS_KEY",
    "STARTING",
    "STOP_KEY",
    "PodState",
    "RayJobState",
    "Report",
    "project_pod",
    "project_ray_job_status",
    "read_pod",
    "read_ray_job",
    "read_report",
]

C = TypeVar("C", bound=Contract)

PROGRESS_KEY = "progress.json"
OUTCOME_KEY = "outcome.json"
ATTEMPT_KEY = "attempt"
"""Keys of the progress ConfigMap; `attempt` tells which attempt the other two speak of."""
OUTCOME_ATTEMPT_KEY = "outcome-attempt"
"""Which attempt the outcome speaks of, where it may be older: the next attempt's first report leaves it standing."""
STOP_KEY = "stop-attempt"
"""The number of an attempt that is asked to save a checkpoint and to stop: the one key that the operator writes. Rank 0
reads it in the answers to its own patches."""

STARTING = frozenset({"ContainerCreating", "PodInitializing"})
"""Reasons for waiting that are no trouble by themselves."""

_JOB_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_DEPLOYMENT_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})
_CONDITIONS = frozenset({"DisruptionTarget", "PodReadyToStartContainers", "PodScheduled", "Ready"})
_VOLUMES = (
    ("secret", "secretName", "Secret"),
    ("configMap", "name", "ConfigMap"),
    ("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
)
"""Sources of volumes that somebody must have made: where a pod has the name, and of what kind it is."""
_REPLICA_FAILURE = "ReplicaFailure"
_LARGEST = 1 << 53
"""No run counts further; a number above it was not written by the trainers, and would not fit into a status."""


@dataclass(frozen=True)
class RayJobState:
    """A RayJob as KubeRay has it."""

    name: str
    uid: str
    owner_uid: str | None
    """Of the object that controls it."""
    attempt: int | None
    created_at: datetime | None
    suspended: bool
    """spec.suspend: it waits in a queue, or was taken out of the cluster again."""
    deployment_status: str
    job_status: str
    reason: str
    message: str
    started_at: datetime | None
    ended_at: datetime | None
    deleting: bool
    pods_refused: str = ""
    """Why KubeRay cannot create a pod: a quota, Pod Security, an admission webhook."""

    @property
    def untouched(self) -> bool:
        """KubeRay has said nothing of it yet."""
        return not (self.deployment_status or self.job_status)

    @property
    def finished(self) -> bool:
        """Nothing will come of it any more. KubeRay itself does not count ValidationFailed among its ends."""
        return self.deployment_status in _DEPLOYMENT_ENDED or self.job_status in _JOB_ENDED

    @property
    def succeeded(self) -> bool:
        """Its entrypoint ended with 0. A deployment that is Complete may also have been stopped."""
        return self.job_status == "SUCCEEDED"

    @property
    def running(self) -> bool:
        """Its cluster is up and the entrypoint has been handed over."""
        return self.deployment_status == "Running" and not self.finished


@dataclass(frozen=True)
class PodState:
    """A pod of a job as the kubelet and the control plane have it."""

    name: str
    attempt: int | None
    role: str
    """names.HEAD, names.WORKER, or empty for a pod of somebody else's making."""
    phase: str
    node: str | None
    reason: str
    """The pod's own, such as Evicted."""
    message: str
    waiting_reason: str | None
    """Why a container does not start, such as ImagePullBackOff; the ordinary reasons only when there is no other."""
    terminated_reason: str | None
    """Why a container ended, such as OOMKilled: of the first that failed, otherwise of one that ended well."""
    exit_code: int | None
    """Of that container."""
    disruption: str | None
    """Who takes the pod away: the reason of condition DisruptionTarget."""
    unschedulable: str | None
    """What the scheduler says when no node will do."""
    ready: bool
    deleting: bool
    waiting_message: str = ""
    """What the kubelet says to `waiting_reason`: which image, which secret."""
    mounting_since: datetime | None = None
    """When the kubelet took the pod, of a pod whose volumes and network are not there yet."""
    volumes: tuple[str, ...] = ()
    """What it mounts that somebody else must have made, such as "Secret keys"."""

    @property
    def failed(self) -> bool:
        """The pod, or a container in it, ended in a way that was not meant."""
        return self.phase == "Failed" or (self.exit_code is not None and self.exit_code != 0)


@dataclass(frozen=True)
class Report:
    """What the trainers wrote last."""

    attempt: int | None = None
    progress: Progress | None = None
    outcome: Outcome | None = None
    stop_attempt: int | None = None
    """The attempt that was asked to stop."""


def read_ray_job(document: Document) -> RayJobState:
    """The state of a RayJob; an empty one for a document that is none."""
    metadata, status = at(document, "metadata"), at(document, "status")
    return RayJobState(
        name=text(metadata, "name"),
        uid=text(metadata, "uid"),
        owner_uid=controller_uid(document),
        attempt=names.attempt_of(at(metadata, "labels")),
        created_at=_time(metadata, "creationTimestamp"),
        suspended=at(document, "spec", "suspend") is True,
        deployment_status=text(status, "jobDeploymentStatus"),
        job_status=text(status, "jobStatus"),
        reason=text(status, "reason"),
        message=text(status, "message"),
        started_at=_time(status, "startTime"),
        ended_at=_time(status, "endTime"),
        deleting=text(metadata, "deletionTimestamp") != "",
        pods_refused=next((text(one, "message") or text(one, "reason") for one in _replica_failures(status)), ""),
    )


def project_ray_job_status(status: Any) -> Document:
    """Of a RayJob's status what `read_ray_job` needs: not the cluster and its pods."""
    kept = only(status, "jobStatus", "jobDeploymentStatus", "reason", "message", "startTime", "endTime")
    failures = [only(one, "type", "status", "reason", "message") for one in _replica_failures(status)]
    return kept | {"rayClusterStatus": {"conditions": failures}} if failures else kept


def read_pod(document: Document) -> PodState:
    """The state of a pod, whole or projected; an empty one for a document that is none."""
    metadata, status = at(document, "metadata"), at(document, "status")
    labels = at(metadata, "labels")
    conditions = {text(condition, "type"): condition for condition in items(status, "conditions")}
    ended = _ended_container(status)
    disruption, scheduled = conditions.get("DisruptionTarget"), conditions.get("PodScheduled")
    waiting = _waiting(status)
    return PodState(
        name=text(metadata, "name"),
        attempt=names.attempt_of(labels),
        role=text(labels, names.ROLE_LABEL),
        phase=text(status, "phase"),
        node=text(document, "spec", "nodeName") or None,
        reason=text(status, "reason"),
        message=text(status, "message"),
        waiting_reason=text(waiting, "reason") or None,
        terminated_reason=text(ended, "reason") or None,
        exit_code=_whole(ended, "exitCode"),
        disruption=text(disruption, "reason") or None if text(disruption, "status") == "True" else None,
        unschedulable=text(scheduled, "message") or None if text(scheduled, "status") == "False" else None,
        ready=text(conditions.get("Ready"), "status") == "True",
        deleting=text(metadata, "deletionTimestamp") != "",
        waiting_message=text(waiting, "message"),
        mounting_since=_time(status, "startTime") if _is_mounting(status, conditions) else None,
        volumes=tuple(_volumes(document)),
    )


def project_pod(document: Document) -> Document:
    """The pod with only what `read_pod` and a store need: a tenth of the whole. Its state reads the same."""
    metadata, status = at(document, "metadata"), at(document, "status")
    kept = ("name", "namespace", "uid", "resourceVersion", "labels", "ownerReferences", "deletionTimestamp")
    statuses = ("containerStatuses", "initContainerStatuses")
    named = [
        {source: only(at(volume, source), key) for source, key, _ in _VOLUMES if text(volume, source, key)}
        for volume in items(at(document, "spec"), "volumes")
    ]
    volumes = [volume for volume in named if volume]
    return {
        "metadata": only(metadata, *kept),
        "spec": only(at(document, "spec"), "nodeName") | ({"volumes": volumes} if volumes else {}),
        "status": only(status, "phase", "reason", "message", "startTime")
        | {
            "conditions": [
                only(condition, "type", "status", "reason", "message")
                for condition in items(status, "conditions")
                if text(condition, "type") in _CONDITIONS
            ]
        }
        | {
            key: [only(container, "name", "state", "lastState") for container in items(status, key)] for key in statuses
        },
    }


def read_report(config_map: Document | None) -> Report:
    """What the progress ConfigMap holds; what cannot be read in it is left out."""
    data = at(config_map, "data")
    progress, outcome = _model(Progress, data, PROGRESS_KEY), _model(Outcome, data, OUTCOME_KEY)
    if progress is not None:
        progress = _sane(progress)
    if outcome is not None and not _believable(
        outcome.step, outcome.total_steps, *(artifact.bytes for artifact in outcome.artifacts)
    ):
        outcome = None
    attempt = at(data, ATTEMPT_KEY)
    if at(data, OUTCOME_ATTEMPT_KEY) not in (None, attempt):
        outcome = None
    return Report(names.attempt_from(attempt), progress, outcome, names.attempt_from(at(data, STOP_KEY)))


def _sane(progress: Progress) -> Progress | None:
    """The report with times that can be compared; None where a number in it cannot be."""
    checkpoint = progress.checkpoint
    numbers = (progress.step, progress.total_steps, progress.tokens_per_second, progress.eta_seconds)
    saved = (checkpoint.step, checkpoint.world_size, checkpoint.bytes) if checkpoint is not None else ()
    if not _believable(*numbers, progress.resumed_from_step, *saved):
        return None
    changes: dict[str, Any] = {"updated_at": sane(progress.updated_at)}
    if checkpoint is not None:
        changes["checkpoint"] = checkpoint.model_copy(update={"saved_at": sane(checkpoint.saved_at)})
    return progress.model_copy(update=changes)


def _whole(value: Any, key: str) -> int | None:
    found = at(value, key)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _time(value: Any, key: str) -> datetime | None:
    """A time as the API writes it, made fit to be compared."""
    try:
        return sane(datetime.fromisoformat(text(value, key)))
    except ValueError:
        return None


def _containers(status: Any) -> list[Any]:
    """Ray's container, the others, and those that ran before them."""
    listed = sorted(items(status, "containerStatuses"), key=lambda one: text(one, "name") != names.RAY_CONTAINER)
    return [*listed, *items(status, "initContainerStatuses")]


def _ended_container(status: Any) -> Any:
    """How the container ended that tells most: one that failed, then one that failed before it was started again."""
    states = [at(one, when, "terminated") for when in ("state", "lastState") for one in _containers(status)]
    ended = [state for state in states if isinstance(state, dict)]
    failed = (state for state in ended if _whole(state, "exitCode") not in (None, 0))
    main = (at(one, "state", "terminated") for one in items(status, "containerStatuses"))
    return next(failed, None) or next((state for state in main if isinstance(state, dict)), None)


def _waiting(status: Any) -> Any:
    """What the container waits for that tells most."""
    states = [at(one, "state", "waiting") for one in _containers(status)]
    given = [state for state in states if text(state, "reason")]
    return next((state for state in given if text(state, "reason") not in STARTING), given[0] if given else None)


def _is_mounting(status: Any, conditions: dict[str, Any]) -> bool:
    """Whether no container can start yet. An image is pulled only when PodReadyToStartContainers holds."""
    waits = [at(one, "state", "waiting") for one in _containers(status)]
    nothing_began = bool(waits) and all(text(one, "reason") in STARTING for one in waits)
    return nothing_began and text(conditions.get("PodReadyToStartContainers"), "status") != "True"


def _volumes(pod: Any) -> Iterator[str]:
    """The plan is left out: the operator makes it."""
    labels = at(pod, "metadata", "labels")
    job, attempt = names.job_of(labels), names.attempt_of(labels)
    plan = names.plan_config_map(job, attempt) if job is not None and attempt is not None else None
    for volume in items(at(pod, "spec"), "volumes"):
        for source, key, kind in _VOLUMES:
            name = text(volume, source, key)
            if name and (kind, name) != ("ConfigMap", plan):
                yield f"{kind} {name}"


def _replica_failures(status: Any) -> Iterator[Any]:
    """KubeRay's condition that a pod could not be created, where it holds."""
    for condition in items(at(status, "rayClusterStatus"), "conditions"):
        if text(condition, "type") == _REPLICA_FAILURE and text(condition, "status") == "True":
            yield condition


def _model(kind: type[C], data: Any, key: str) -> C | None:
    """ValueError covers what pydantic says of wrong contents and of JSON that is none."""
    try:
        return kind.model_validate_json(text(data, key))
    except ValueError:
        return None


def _believable(*numbers: float | None) -> bool:
    return all(number is None or 0 <= number <= _LARGEST for number in numbers)
