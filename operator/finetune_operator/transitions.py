"""What the step from one status to the next tells the metrics: attempts that ended, first steps, goodput.

Called by the reconcile pass after the newer status was written, so that nothing is counted twice or in vain.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.job import Attempt, Status
from finetune_api.progress import Result
from finetune_operator.metrics import Metrics

__all__ = ["count_transition", "goodput"]

Document = dict[str, Any]


def count_transition(metrics: Metrics, job: Document, after: Document) -> None:
    """Counts what `after` says and the status in `job` did not."""
    try:
        before, now = Status.model_validate(job.get("status") or {}), Status.model_validate(after)
    except ValidationError:
        return  # written by a newer version of ours, or by hand: not ours to count
    known = {attempt.number: attempt for attempt in before.attempts}
    for attempt in now.attempts:
        earlier = known.get(attempt.number)
        if attempt.ended_at is not None and (earlier is None or earlier.ended_at is None):
            metrics.attempts.labels(attempt.outcome or "Unknown").inc()
    _count_first_step(metrics, job, before, now)
    if now.finished_at is not None and before.finished_at is None:
        share = goodput(now)
        if share is not None:
            metrics.goodput.observe(share)


def goodput(status: Status) -> float | None:
    """Share of the attempts' running time that went into steps which the job kept; None where none has run.

    Steps done after the last checkpoint of a failed attempt were done again: they and the time before the first step
    are what is lost. An attempt that never trained tells nothing of what the one before it has left. Of a long list of
    attempts the status holds the last ten.
    """
    spent, kept, following = 0.0, 0.0, None
    for attempt in reversed(status.attempts):
        spent += _seconds(attempt.admitted_at or attempt.created_at, attempt.ended_at)
        kept += _seconds(attempt.running_at, attempt.ended_at) * _share_kept(attempt, following)
        following = attempt if attempt.resumed_from_step is not None else following
    return min(1.0, kept / spent) if spent > 0 else None


def _share_kept(attempt: Attempt, following: Attempt | None) -> float:
    """`following` is the next attempt that trained, None where there is none."""
    begun = attempt.resumed_from_step or 0
    done = attempt.step - begun
    if done <= 0:
        return 0.0
    if following is not None:
        left = following.resumed_from_step
    else:
        left = attempt.step if attempt.outcome == Result.SUCCEEDED else attempt.checkpoint_step
    return min(1.0, max(0.0, ((left or 0) - begun) / done))


def _count_first_step(metrics: Metrics, job: Document, before: Status, now: Status) -> None:
    created_at = job["metadata"].get("creationTimestamp")
    if not created_at or any(attempt.running_at for attempt in before.attempts):
        return
    first = next((attempt.running_at for attempt in now.attempts if attempt.running_at), None)
    if first is not None and now.attempts[0].number == 1:
        metrics.first_step_seconds.observe(_seconds(datetime.fromisoformat(created_at), first))


def _seconds(begin: datetime | None, end: datetime | None) -> float:
    return max(0.0, (end - begin).total_seconds()) if begin is not None and end is not None else 0.0
