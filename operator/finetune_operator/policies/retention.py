"""What is kept, and for how long: the job itself, the clusters of its last attempt, and what older attempts left.

A job that has ended is deleted `ttlSecondsAfterFinished` later, and takes all that it owns along; artifacts are not
objects of the cluster and stay. The RayJob and the plan of an attempt stay until the next attempt starts, so that there
is something to look at. KubeRay itself ends the pods of a RayJob that has ended; only a RayJob that still runs when its
job has ended is ended here. Called by the reconcile pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from finetune_api.spec import Lifecycle
from finetune_operator.states import RayJobState
from finetune_operator.times import after

__all__ = ["GRACE_SECONDS", "cluster_kept_until", "expires_at", "superseded_plans", "superseded_ray_jobs"]

GRACE_SECONDS = 300
"""The trainers' own word ends a job a moment before KubeRay has noticed that its entrypoint is done."""


def expires_at(finished_at: datetime, lifecycle: Lifecycle) -> datetime | None:
    """When a job that ended at `finished_at` is deleted; None: never."""
    seconds = lifecycle.ttl_seconds_after_finished
    return None if seconds is None else after(finished_at, seconds)


def cluster_kept_until(finished_at: datetime, failed: bool, lifecycle: Lifecycle) -> datetime:
    """Until when a RayJob may still run whose job ended at `finished_at`."""
    kept = lifecycle.keep_failed_cluster_seconds if failed else 0
    return after(finished_at, max(GRACE_SECONDS, kept))


def superseded_ray_jobs(ray_jobs: Mapping[int, RayJobState], attempt: int) -> list[RayJobState]:
    """The RayJobs that go when `attempt` starts, oldest first."""
    return [ray_jobs[number] for number in sorted(ray_jobs) if number != attempt and not ray_jobs[number].deleting]


def superseded_plans(plans: Iterable[int], attempt: int) -> list[int]:
    """The attempts whose plans go when `attempt` starts, oldest first."""
    return sorted(number for number in plans if number != attempt)
