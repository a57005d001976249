"""Whether a job is held: because a person asked for it, or because the failure policy did.

A hold by the failure policy ends as any other suspension does: a person sets `suspend` to true, which takes the hold
over, and then to false. Which of the two holds a job is kept in the reason of its condition Suspended. Called by the
reconcile pass.

Trainers that save checkpoints are asked to save one and to stop before their attempt is ended, and are given some time
for it. An attempt that was asked is ended in any case, even if the job is held no longer: it may have stopped already.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from finetune_api.job import Attempt, Condition
from finetune_api.spec import Lifecycle
from finetune_operator.states import RayJobState, Report
from finetune_operator.times import after

__all__ = ["Hold", "can_save", "hold_on", "saves_until"]


class Hold(StrEnum):
    """Who holds the job; the values are reasons of condition Suspended."""

    NONE = "NotSuspended"
    REQUESTED = "Requested"
    """spec.suspend is true."""
    FAILURE_POLICY = "FailurePolicy"
    """An attempt failed, and the action for that is Suspend."""


def hold_on(asked: bool, before: Condition | None, failed_into_hold: bool) -> Hold:
    """Who holds the job now.

    `asked` is spec.suspend, `before` the condition Suspended as it stands, and `failed_into_hold` tells that an attempt
    has just failed with action Suspend.
    """
    if asked:
        return Hold.REQUESTED
    held = before is not None and before.status == "True" and before.reason == Hold.FAILURE_POLICY
    return Hold.FAILURE_POLICY if failed_into_hold or held else Hold.NONE


def can_save(attempt: Attempt, ray_job: RayJobState | None, report: Report) -> bool:
    """Whether asking the trainers of `attempt` to save and to stop is of use: they train, and have not ended."""
    trains = attempt.admitted_at is not None and attempt.running_at is not None
    lives = ray_job is not None and ray_job.running and not ray_job.deleting and not ray_job.suspended
    return trains and lives and report.outcome is None


def saves_until(attempt: Attempt, now: datetime, lifecycle: Lifecycle) -> datetime:
    """Until when an attempt that was asked to save and to stop, or is now, may take."""
    return after(attempt.stop_asked_at or now, lifecycle.suspend_grace_seconds)
