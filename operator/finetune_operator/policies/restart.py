"""What follows from a failure: another attempt, the end, or a person's decision.

The job's own rules come first; then each class of failure has its default. What the platform took away is tried again
free of charge, with a budget of its own; what another try may mend is tried again and counted; what a person must mend
fails at once. Three attempts in a row that come no further than those before them fail the job too: trying a fourth
time would burn the same GPUs for the same end.

How far an attempt came is what it leaves to the next one. Where attempts go on from checkpoints, that is its newest
one: an attempt that went on after step 400, came to 410 and saved nothing has come no further, and the next one would
do those ten steps again. Where every attempt begins at step 0, it is the steps that it made.

Called by the reconcile pass when an attempt has failed. It decides; the pass carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt
from finetune_api.spec import Action, Backoff, FailurePolicy, FailureRule

__all__ = ["ATTEMPTS_WITHOUT_PROGRESS", "DEFAULT_ACTIONS", "History", "Verdict", "halved", "judge"]

DEFAULT_ACTIONS: dict[FailureClass, Action] = {
    FailureClass.PREEMPTED: Action.RETRY_FREE,
    FailureClass.NODE_LOST: Action.RETRY,
    FailureClass.STORAGE_ERROR: Action.RETRY,
    FailureClass.HANG: Action.RETRY,
    FailureClass.START_TIMEOUT: Action.RETRY,
    FailureClass.UNKNOWN: Action.RETRY,
    FailureClass.OUT_OF_MEMORY: Action.RETRY_WITH_SMALLER_MICRO_BATCH,
    FailureClass.USER_ERROR: Action.FAIL,
    FailureClass.DATA_ERROR: Action.FAIL,
    FailureClass.NON_FINITE_LOSS: Action.FAIL,
    FailureClass.KL_DIVERGED: Action.FAIL,
    FailureClass.DEPENDENCY_FAILED: Action.FAIL,
    FailureClass.DEADLINE_EXCEEDED: Action.FAIL,
}
"""What is done after a failure of each class when no rule of the job says otherwise."""

ATTEMPTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class History:
    """What the job has been through."""

    attempts: Sequence[Attempt]
    """Oldest first; the last one is the one that has just failed."""
    restarts: int = 0
    preemptions: int = 0
    micro_batch_size: int | None = None
    """Of the attempt that has just failed; None when it is not known."""
    saves: bool = False
    """The job saves checkpoints, and its attempts go on from them."""


@dataclass(frozen=True)
class Verdict:
    """What to do. The counts are what they become by it."""

    action: Action
    reason: str
    """Of condition Failed when the action is Fail; otherwise the class of the failure."""
    message: str
    restarts: int
    preemptions: int
    wait_seconds: int = 0
    """Before another attempt."""


def judge(
    failure: FailureClass, exit_code: int | None, message: str, history: History, policy: FailurePolicy
) -> Verdict:
    """What follows from a failure of this class, with this exit code and message."""
    action = _action(failure, exit_code, message, policy)
    if action is Action.RETRY_FREE:
        return _free(failure, history, policy)
    if action in (Action.RETRY, Action.RETRY_WITH_SMALLER_MICRO_BATCH):
        return _counted(action, failure, history, policy)
    reason = "is not tried again" if action is Action.FAIL else "waits for a person: set suspend to true, then to false"
    return Verdict(action, failure.value, f"A job that ends so {reason}.", history.restarts, history.preemptions)


def halved(micro_batch_size: int) -> int | None:
    """The largest micro-batch to try after this one ran out of memory; None when there is no smaller one.

    Planning takes the next that divides the work: the global batch, and so what is trained, stays the same.
    """
    return micro_batch_size // 2 if micro_batch_size > 1 else None


def _action(failure: FailureClass, exit_code: int | None, message: str, policy: FailurePolicy) -> Action:
    matching = (rule.action for rule in policy.rules_ if _matches(rule, failure, exit_code, message))
    return next(matching, DEFAULT_ACTIONS[failure])


def _matches(rule: FailureRule, failure: FailureClass, exit_code: int | None, message: str) -> bool:
    if rule.classes and failure not in rule.classes:
        return False
    if rule.exit_codes and exit_code not in rule.exit_codes:
        return False
    return rule.message_pattern is None or _occurs(rule.message_pattern, message)


def _occurs(pattern: str, text: str) -> bool:
    """Whether the parts between the pattern's stars occur in this order. No regular expression: those can be made
    to take hours."""
    text, position = text.casefold(), 0
    for part in pattern.casefold().split("*"):
        found = text.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _free(failure: FailureClass, history: History, policy: FailurePolicy) -> Verdict:
    limit, count = policy.max_preemptions, history.preemptions + 1
    if limit is not None and count > limit:
        return _over("MaxPreemptionsExceeded", f"failurePolicy.maxPreemptions allows {limit}", history)
    return Verdict(
        Action.RETRY_FREE,
        failure.value,
        "It is tried again, and not counted as a restart.",
        history.restarts,
        count,
        policy.backoff.initial_seconds,
    )


def _counted(action: Action, failure: FailureClass, history: History, policy: FailurePolicy) -> Verdict:
    smaller = None
    if action is Action.RETRY_WITH_SMALLER_MICRO_BATCH and history.micro_batch_size is not None:
        smaller = halved(history.micro_batch_size)
        if smaller is None:
            return _over(failure.value, "the micro-batch is a single sequence already", history)
    count = history.restarts + 1
    if count > policy.max_restarts:
        return _over("MaxRestartsExceeded", f"failurePolicy.maxRestarts allows {policy.max_restarts}", history)
    if action is Action.RETRY and _stalled(history.attempts, history.saves):
        came = "left no newer checkpoint" if history.saves else "came no further"
        num = ATTEMPTS_WITHOUT_PROGRESS
        return _over("NoProgress", f"the last {num} attempts {came} than those before them", history)
    how = f" with a micro-batch of at most {smaller}" if smaller is not None else ""
    return Verdict(
        action,
        failure.value,
        f"It is tried again{how}: restart {count} of {policy.max_restarts}.",
        count,
        history.preemptions,
        _wait_seconds(policy.backoff, count),
    )


def _over(reason: str, why: str, history: History) -> Verdict:
    message = f"It is not tried again: {why}."
    return Verdict(Action.FAIL, reason, message, history.restarts, history.preemptions)


def _wait_seconds(backoff: Backoff, restarts: int) -> int:
    """Doubled with each restart; the exponent is bounded because the count is not."""
    doublings: int = min(max(restarts - 1, 0), 32)
    return min(backoff.max_seconds, backoff.initial_seconds << doublings)


def _stalled(attempts: Sequence[Attempt], saves: bool) -> bool:
    """Whether the last attempts that were tried again as they were came no further than any attempt before them.

    An attempt that was preempted, suspended, or given a smaller micro-batch says nothing about the next one; but what
    it achieved is progress.
    """
    last = len(attempts) - 1  # what follows from it is not settled yet
    same = [place for place, attempt in enumerate(attempts) if attempt.action == Action.RETRY or place == last]
    if len(same) < ATTEMPTS_WITHOUT_PROGRESS or same[-ATTEMPTS_WITHOUT_PROGRESS] == 0:
        return False
    first = same[-ATTEMPTS_WITHOUT_PROGRESS]
    if saves:
        following = (*attempts[first + 1 :], None)
        return not any(map(_saved_more, attempts[first:], following))
    best = max(attempt.step for attempt in attempts[:first])
    return all(attempt.step <= best for attempt in attempts[first:])


def _saved_more(attempt: Attempt, following: Attempt | None) -> bool:
    """Whether the attempt saved steps that it did not begin with.

    Its last report may be older than its last checkpoint: where the next attempt went on tells too.
    """
    if attempt.resumed_from_step is None:
        return False  # it never trained
    later = following.resumed_from_step if following is not None else None
    return max(attempt.checkpoint_step or 0, later or 0) > attempt.resumed_from_step
