"""An attempt whose trainers have fallen silent is hung: its GPUs are taken back and the failure policy goes on.

The heartbeat is the time of the trainers' last report, whatever they were doing: a collective that never returns hangs
while workers start just as it does while they train. Silence before the first report is not a hang but a late start
(`policies.deadline`). Called by the reconcile pass for the attempt that goes on.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt
from finetune_api.spec import FailurePolicy
from finetune_operator.policies.due import Due
from finetune_operator.times import after

__all__ = ["hang_due"]


def hang_due(
    attempt: Attempt, heartbeat: datetime | None, policy: FailurePolicy, doing: str | None = None
) -> Due | None:
    """When `attempt` counts as hung, if nothing is heard of it until then.

    `heartbeat` is when its trainers last reported since it was admitted, None when they have not. None while it waits
    in a queue, and before its first report. `doing`: what they said last that they were at.
    """
    if attempt.admitted_at is None or (heartbeat is None and attempt.running_at is None):
        return None
    signs = (attempt.admitted_at, attempt.running_at, heartbeat)
    seconds = policy.hang_timeout_seconds
    return Due(
        after(max(sign for sign in signs if sign is not None), seconds),
        FailureClass.HANG,
        f"The trainers have reported nothing for {seconds} s (failurePolicy.hangTimeoutSeconds)."
        + (f" The last report is of {doing}." if heartbeat is not None and doing is not None else ""),
    )
