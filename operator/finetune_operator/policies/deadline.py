"""How long an attempt may take to start, and how long all attempts may take together.

Both clocks run only while the platform lets the job run. The start deadline begins when an attempt is admitted, and
begins anew when a queue takes the attempt back and admits it again. The active deadline adds up the running time of
all attempts, so neither a suspension nor a restart sets it back. Called by the reconcile pass for the attempt that
goes on.
"""

from __future__ import annotations

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt
from finetune_api.spec import Lifecycle
from finetune_operator.policies.due import Due
from finetune_operator.times import after

__all__ = ["active_due", "start_due", "used_up"]


def start_due(attempt: Attempt, has_reported: bool, lifecycle: Lifecycle, obstacle: str = "") -> Due | None:
    """When `attempt` is too late; None when its trainers have started, or while it waits in a queue.

    `obstacle` is what keeps them from starting, as far as it is known; it becomes part of the message.
    """
    if attempt.admitted_at is None or has_reported or attempt.running_at is not None:
        return None
    seconds = lifecycle.start_deadline_seconds
    message = f"The trainers have not started within {seconds} s (lifecycle.startDeadlineSeconds)"
    return Due(
        after(attempt.admitted_at, seconds),
        FailureClass.START_TIMEOUT,
        f"{message}: {obstacle}" if obstacle else f"{message}.",
    )


def active_due(attempt: Attempt, active_seconds: int, lifecycle: Lifecycle) -> Due | None:
    """When the job has used up its time; None without a limit, or while it waits in a queue.

    `active_seconds` is what the attempts before this one took.
    """
    limit = lifecycle.active_deadline_seconds
    if limit is None or attempt.admitted_at is None:
        return None
    left = max(0, limit - max(0, active_seconds))
    return Due(after(attempt.admitted_at, left), FailureClass.DEADLINE_EXCEEDED, _message(limit))


def used_up(active_seconds: int, lifecycle: Lifecycle) -> str | None:
    """Why no other attempt may start: the earlier ones took all the time there is. None while there is some left."""
    limit = lifecycle.active_deadline_seconds
    return _message(limit) if limit is not None and active_seconds >= limit else None


def _message(limit: int) -> str:
    return f"All attempts together took {limit} s, which is all that lifecycle.activeDeadlineSeconds allows."
