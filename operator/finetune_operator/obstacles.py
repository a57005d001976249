"""What keeps an attempt from starting: told by its pods, or by KubeRay, or by that nobody says anything.

Pure; called by `decide` for an attempt whose cluster is not there yet. Some things count only after a while: a pod has
its volumes within seconds, and KubeRay answers within one. So an obstacle names the moment from which on it is one, and
the pass looks again then: nothing else would wake it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from finetune_operator.states import STARTING, PodState, RayJobState
from finetune_operator.status import clip
from finetune_operator.times import after

__all__ = ["PATIENCE_SECONDS", "Obstacle", "obstacles"]

PATIENCE_SECONDS = 30.0
"""How long a pod may take to have its volumes, and KubeRay to answer."""

_LONGEST_WORDS = 300
"""Of what others say; a registry's whole answer may be in it."""
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}")


@dataclass(frozen=True)
class Obstacle:
    """Something that stands in the way."""

    reason: str
    """In a word: Kubernetes' own, where it has one."""
    message: str
    since: datetime | None = None
    """From when on it counts, should nothing change; None for at once."""


def obstacles(ray_job: RayJobState | None, pods: Iterable[PodState]) -> Iterator[Obstacle]:
    """All that stands in the way, or will when nothing changes; what tells most comes first."""
    pods = tuple(pods)
    for pod in pods:
        if pod.unschedulable:
            yield Obstacle("Unschedulable", f"pod {pod.name} cannot be scheduled: {pod.unschedulable}")
        elif pod.waiting_reason and pod.waiting_reason not in STARTING:
            reason = pod.waiting_reason if _WORD.fullmatch(pod.waiting_reason) else "PodsWaiting"
            yield Obstacle(reason, f"pod {pod.name} waits: {pod.waiting_reason}{_in_brackets(pod.waiting_message)}")
    if ray_job is not None and ray_job.pods_refused:
        said = clip(ray_job.pods_refused.strip(), _LONGEST_WORDS)
        yield Obstacle("PodsNotCreated", f"KubeRay cannot create the pods of RayJob {ray_job.name}: {said}")
    for pod in pods:
        if pod.mounting_since is not None and not pod.deleting:
            yield Obstacle("VolumesNotMounted", _not_mounted(pod), after(pod.mounting_since, PATIENCE_SECONDS))
    if ray_job is not None and ray_job.untouched and ray_job.created_at is not None:
        yield Obstacle("KubeRaySilent", _silent(ray_job), after(ray_job.created_at, PATIENCE_SECONDS))


def _in_brackets(message: str) -> str:
    said = clip(message.strip(), _LONGEST_WORDS)
    return f" ({said})" if said else ""


def _not_mounted(pod: PodState) -> str:
    mounts = f"It mounts {', '.join(pod.volumes)}" if pod.volumes else "It mounts nothing that somebody else must make"
    return (
        f"pod {pod.name} waits for its volumes, or for its network. {mounts}; `kubectl describe pod {pod.name}` says "
        "what is missing."
    )


def _silent(ray_job: RayJobState) -> str:
    return (
        f"KubeRay does not answer: RayJob {ray_job.name} has no status. See whether its operator runs and looks after "
        "this namespace: `kubectl get deployments -A -l app.kubernetes.io/component=kuberay-operator`, and its log."
    )
