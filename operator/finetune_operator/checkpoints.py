"""What the trainers' reports say of checkpoints, written into the status: the newest one, and where an attempt began.

`decide` calls it for the newest attempt. The newest checkpoint stays from attempt to attempt and only becomes newer,
with one exception: trainers that begin before it, because they rejected it, or were told to begin anew, or because this
is another training by now, take the status back to what they themselves know of. Nobody will go on from the newer one
any more. An old report takes nothing back.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.progress import Progress, SavedCheckpoint, Stage
from finetune_operator.decision import Event
from finetune_operator.states import Report
from finetune_operator.status import Draft, clip

__all__ = ["begin", "keep_newest"]

_STEPS = frozenset({Stage.TRAINING, Stage.EVALUATING})
"""Stages that only the training loop reports: without a word of an earlier attempt's steps it began at 0. The same
follows from `total_steps`, which is told from then on: short training may be over before anybody looks."""
_EVENT_LENGTH = 1024


def keep_newest(draft: Draft, report: Report) -> None:
    """Takes the newest attempt's checkpoint into the status, if it is newer. An attempt may have ended and still save
    one, on its way out."""
    newest = report.progress.checkpoint if report.progress is not None else None
    standing = draft.checkpoint
    if newest is not None and (standing is None or _age(newest) > _age(standing)):
        draft.checkpoint = newest


def begin(draft: Draft, progress: Progress) -> list[Event]:
    """Notes where the attempt that goes on began to train, and what it has saved -> what people should hear of that.

    `progress` was reported since the attempt was admitted. Workers may be started again within an attempt: it began
    where they did first.
    """
    begun_at, attempt, saved, standing = _begun_at(progress), draft.attempts[-1], progress.checkpoint, draft.checkpoint
    if begun_at is None:
        return []
    is_first = attempt.resumed_from_step is None
    if is_first:
        draft.change_last(resumed_from_step=begun_at)
    goes_back = (is_first or _is_news(draft, progress)) and (
        standing is not None and standing.step > max(begun_at, saved.step if saved is not None else 0)
    )
    if goes_back:
        draft.checkpoint = saved
    if saved is not None and saved.step > (attempt.checkpoint_step or 0):
        draft.change_last(checkpoint_step=saved.step)
    return _told(attempt.number, begun_at, progress) if is_first or goes_back else []


def _is_news(draft: Draft, progress: Progress) -> bool:
    shown = draft.standing.progress
    return shown is None or shown.updated_at is None or progress.updated_at > shown.updated_at


def _begun_at(progress: Progress) -> int | None:
    """Steps that were done when training began; None while that is not known."""
    if progress.resumed_from_step is not None:
        return progress.resumed_from_step
    return 0 if progress.stage in _STEPS or progress.total_steps is not None else None


def _told(attempt: int, begun_at: int, progress: Progress) -> list[Event]:
    """Events of a beginning."""
    told = [
        Event("Warning", "CheckpointRejected", clip(f"Attempt {attempt} does not go on from {one}", _EVENT_LENGTH))
        for one in progress.rejected_checkpoints
    ]
    if begun_at:
        message = f"Attempt {attempt} goes on after step {begun_at}."
        told.append(Event("Normal", "ResumedFromCheckpoint", message))
    return told


def _age(checkpoint: SavedCheckpoint) -> tuple[int, datetime]:
    return checkpoint.step, checkpoint.saved_at
