"""What the trainers' reports say of checkpoints, written into the status: the newest one, and where an attempt began.

`decide` calls it for the newest attempt. The newest checkpoint stays from attempt to attempt and only becomes newer,
with one exception: an attempt that begins to train before it, because it rejected it, or was told to begin anew, or
is another training by now, takes the status back to what that attempt itself knows of. Nobody will go on from the
newer one any more.
"""

from __future__ import annotations

from datetime import datetime

from finetune_api.progress import Progress, SavedCheckpoint, Stage
from finetune_operator.decision import Event
from finetune_operator.states import Report
from finetune_operator.status import Draft, clip

__all__ = ["begin", "keep_newest"]

_STEPS = frozenset({Stage.TRAINING, Stage.EVALUATING})
"""Stages that only the training loop reports: without a word of an earlier attempt's steps it began at 0."""
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

    `progress` was reported since the attempt was admitted.
    """
    begun_at, attempt, saved = _begun_at(progress), draft.attempts[-1], progress.checkpoint
    if begun_at is None:
        return []
    told: list[Event] = []
    if attempt.resumed_from_step is None or (
        # A queue took the attempt back and let it start again. An older report than the last is no news.
        attempt.resumed_from_step != begun_at and progress.updated_at > _last_report(draft, progress.updated_at)
    ):
        told = _told(attempt.number, begun_at, progress)
        draft.change_last(resumed_from_step=begun_at)
        if draft.checkpoint is not None and draft.checkpoint.step > max(begun_at, saved.step if saved else 0):
            draft.checkpoint = saved
    if saved is not None and saved.step > (attempt.checkpoint_step or 0):
        draft.change_last(checkpoint_step=saved.step)
    return told


def _begun_at(progress: Progress) -> int | None:
    """Steps that were done when training began; None while that is not known."""
    if progress.resumed_from_step is not None:
        return progress.resumed_from_step
    return 0 if progress.stage in _STEPS else None


def _last_report(draft: Draft, otherwise: datetime) -> datetime:
    shown = draft.standing.progress
    return shown.updated_at if shown is not None and shown.updated_at is not None else otherwise


def _told(attempt: int, begun_at: int, progress: Progress) -> list[Event]:
    """Events at the beginning: once for each start of an attempt, however long it goes on."""
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
