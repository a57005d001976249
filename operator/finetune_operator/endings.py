"""What the end of an attempt does to the job: another attempt, a hold, success, or failure for good.

`decide` calls these on its draft of the status. The policies judge; here their verdict is written down.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt, Phase, PostMortem
from finetune_api.progress import Outcome, Result
from finetune_api.spec import Action, FailurePolicy
from finetune_operator.conditions import JOBS_FAULT, Finding, ended
from finetune_operator.decision import Event
from finetune_operator.policies.classification import Ending
from finetune_operator.policies.restart import History, Verdict, judge
from finetune_operator.states import Report
from finetune_operator.status import Draft, clip
from finetune_operator.times import after, seconds_between

__all__ = ["SUSPENDED", "close", "fail", "give_up", "last_step", "post_mortem", "settle", "succeed", "suspend", "told"]

SUSPENDED = "Suspended"
"""Outcome of an attempt that was ended because the job was suspended."""

_MESSAGE, _REASON, _POD, _POST_MORTEM = 1024, 256, 253, 4096
"""What the fields of the status may hold."""


def close(draft: Draft, outcome: str, message: str, step: int = 0, ended_at: datetime | None = None) -> Attempt:
    """The newest attempt has ended. Its running time is added to the job's."""
    attempt = draft.attempts[-1]
    moment = max(attempt.created_at, draft.now if ended_at is None else min(draft.now, ended_at))
    if attempt.admitted_at is not None:
        draft.active_seconds += int(seconds_between(attempt.admitted_at, moment))
    return draft.change_last(
        ended_at=moment, outcome=clip(outcome, 64), message=clip(message, _MESSAGE), step=max(step, attempt.step)
    )


def settle(draft: Draft, ending: Ending, policy: FailurePolicy, *, saves: bool = False) -> Verdict | None:
    """What follows from an attempt that was closed and did not succeed; None when it was cancelled.

    `saves`: the job's attempts go on from checkpoints.
    """
    attempt = draft.attempts[-1]
    if ending.failure_class is None:
        _finish(draft, Phase.FAILED, Finding("Failed", "True", "Cancelled", ending.message or "The run was stopped."))
        return None
    draft.post_mortem = post_mortem(attempt.number, ending.failure_class, ending)
    micro = attempt.micro_batch_size or (draft.resolved.micro_batch_size if draft.resolved is not None else None)
    history = History(draft.attempts, draft.restarts, draft.preemptions, micro, saves)
    verdict = judge(ending.failure_class, ending.exit_code, ending.message, history, policy)
    draft.change_last(action=verdict.action.value)
    draft.restarts, draft.preemptions = verdict.restarts, verdict.preemptions
    if verdict.action is Action.FAIL:
        message = ending.message if verdict.reason == ending.failure_class else f"{verdict.message}\n{ending.message}"
        fail(draft, ending.failure_class, verdict.reason, message)
    elif verdict.action is not Action.SUSPEND:
        draft.next_attempt_at = after(draft.now, verdict.wait_seconds)
    return verdict


def give_up(draft: Draft, ending: Ending) -> None:
    """No policy is asked: the job's time is used up."""
    assert ending.failure_class is not None
    attempt = draft.change_last(action=Action.FAIL.value)
    draft.post_mortem = post_mortem(attempt.number, ending.failure_class, ending)
    fail(draft, ending.failure_class, ending.failure_class.value, ending.message)


def succeed(draft: Draft, outcome: Outcome | None) -> None:
    """The job is done. `outcome` is the trainers' own account; it may have been lost."""
    found = [finding for finding in ended(outcome) if finding.type == "Complete"]
    complete = Finding("Complete", "True", Result.SUCCEEDED, "The training command succeeded.")
    draft.artifacts = list(outcome.artifacts) if outcome is not None and found else draft.artifacts
    _finish(draft, Phase.SUCCEEDED, found[0] if found else complete)


def fail(draft: Draft, failure: FailureClass, reason: str, message: str) -> None:
    """The job has failed for good."""
    draft.failure = failure
    if failure in JOBS_FAULT:
        draft.find(Finding("Valid", "False", failure.value, message))
    _finish(draft, Phase.FAILED, Finding("Failed", "True", reason, message))


def suspend(draft: Draft, report: Report, saved_in_time: bool = True) -> None:
    """The attempt that goes on is ended because somebody asked for it; it counts as nothing.

    `saved_in_time` False: its trainers were asked to save and to stop, and did not.
    """
    step = last_step(report)
    late = "" if saved_in_time else " Its trainers were asked to save and to stop, and did not in time."
    kept = f" Step {draft.checkpoint.step} is saved." if draft.checkpoint is not None else ""
    close(draft, SUSPENDED, f"spec.suspend was set to true.{late}{kept}", step)


def last_step(report: Report, told: int | None = None) -> int:
    """The last step that the trainers reported."""
    progress, outcome = report.progress, report.outcome
    return max(told or 0, progress.step if progress is not None else 0, outcome.step if outcome is not None else 0)


def post_mortem(attempt: int, failure: FailureClass, ending: Ending) -> PostMortem:
    """What is known of the failure, within what the status may hold."""
    return PostMortem(
        attempt=attempt,
        failure_class=failure,
        exit_code=ending.exit_code,
        pod=clip(ending.pod, _POD) if ending.pod else None,
        reason=clip(ending.reason, _REASON) if ending.reason else None,
        message=clip(ending.message, _POST_MORTEM),
    )


def told(draft: Draft, ending: Ending, verdict: Verdict | None) -> Event:
    """The end of an attempt that did not succeed, for people."""
    attempt = draft.attempts[-1]
    what = f"Attempt {attempt.number} ended as {attempt.outcome}: {ending.message or 'no reason is known'}"
    return Event(
        "Warning", "AttemptFailed", clip(f"{what}\n{verdict.message}" if verdict is not None else what, _MESSAGE)
    )


def _finish(draft: Draft, phase: Phase, finding: Finding) -> None:
    draft.phase = phase
    ended_at = draft.last.ended_at if draft.last is not None else None
    draft.finished_at = max(draft.now, ended_at or draft.now)
    draft.next_attempt_at = None
    draft.find(finding)
