"""Whether a job is held: because a person asked for it, or because the failure policy did.

A hold by the failure policy ends as any other suspension does: a person sets `suspend` to true, which takes the hold
over, and then to false. Which of the two holds a job is kept in the reason of its condition Suspended. Called by the
reconcile pass.
"""

from __future__ import annotations

from enum import StrEnum

from finetune_api.job import Condition

__all__ = ["Hold", "hold_on"]


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
