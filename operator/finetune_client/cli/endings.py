"""From a session's last look to the end that is told: what the operator says of a job, and what its process said.

Called by `finetune run` for each job.
"""

from __future__ import annotations

from finetune_api.failures import Failure, FailureClass
from finetune_api.job import Phase, Status
from finetune_api.progress import Outcome, Progress, Result
from finetune_client.attempts import RunningAttempt
from finetune_client.cli.results import SUSPENDED_RESULT, Ending
from finetune_client.runner import written_outcome
from finetune_client.session import Session
from finetune_operator.conditions import find
from finetune_operator.kinds import Key

__all__ = ["ending_of"]

_MESSAGE_LIMIT = 4096


def ending_of(session: Session, key: Key, attempt: RunningAttempt | None) -> Ending:
    """How a job of the session ended; `attempt` is the last one that was started."""
    status = session.status(key)
    result = _result(status, session.stopping)
    progress = attempt.progress if attempt is not None else None
    folder = session.folder.of_job(key)
    # A job that had ended before the run was resumed has no attempt in this process, but its files.
    known = attempt.last if attempt is not None else written_outcome(folder)
    return Ending(
        name=key.name,
        result=result,
        status=status,
        outcome=_outcome(result, status, known, progress),
        progress=progress,
        plan=attempt.run.plan if attempt is not None else None,
        workdir=folder,
        log=attempt.run.log if attempt is not None else None,
        can_go_on=status.finished_at is None and result != Result.FAILED,
        run=session.folder.path,
    )


def _result(status: Status, stopped: bool) -> str:
    if status.phase is Phase.SUCCEEDED:
        return Result.SUCCEEDED
    failed = find(status.conditions, "Failed")
    if failed is not None and failed.reason == Result.CANCELLED:
        return Result.CANCELLED
    if status.phase is Phase.FAILED:
        return Result.FAILED
    if stopped:
        return Result.CANCELLED
    valid = find(status.conditions, "Valid")
    # What is neither is suspended, or waits for a job that is.
    return Result.FAILED if valid is not None and valid.status == "False" else SUSPENDED_RESULT


def _outcome(result: str, status: Status, known: Outcome | None, progress: Progress | None) -> Outcome:
    """The last attempt's outcome, with the failure that ended the job."""
    step = progress.step if progress else 0
    total = progress.total_steps if progress else None
    outcome = known or Outcome(result=Result.CANCELLED, step=step, total_steps=total)
    if result != Result.FAILED:
        return outcome
    failure = outcome.failure
    if failure is None or (status.failure is not None and failure.failure_class != status.failure):
        failure = _failure(status, step)
    return outcome.model_copy(update={"result": Result.FAILED, "failure": failure})


def _failure(status: Status, step: int) -> Failure:
    """What the operator says, where the process could not know: that it hung, say, or took too long."""
    said = find(status.conditions, "Failed") or find(status.conditions, "Valid")
    invalid = said is not None and said.type == "Valid" and said.reason != "InternalError"
    kind = status.failure or (FailureClass.USER_ERROR if invalid else FailureClass.UNKNOWN)
    message = said.message if said is not None and said.message else "The job failed and left no reason."
    return Failure(failure_class=kind, message=message[:_MESSAGE_LIMIT], step=step or None)
