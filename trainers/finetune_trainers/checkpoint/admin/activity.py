"""Whether a run seems to be at work at a place, as far as the storage tells.

Nothing there beats like a heart: an attempt writes its fence when it begins and an intent whenever it begins to save.
The later of these is its last sign of life. An attempt counts as at work until it has been silent for an hour, or for
three times the longest pause between two of its signs, whichever is longer. Signs carry the clock of the machine that
wrote them: one that is an hour slow may look finished an hour early. So this keeps people from mistakes, and no promise
rests on it; what a sweep may delete is safe to delete under a running attempt too (`sweep`).

A fence that `finetune ckpt` took itself is nobody's work: whoever held an earlier one can publish no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise

from finetune_api.checkpoints import Activity
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import BadDocumentError, parse
from finetune_trainers.checkpoint.fence import Fence, current_epoch
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.manifest import Intent
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import TrainerError

__all__ = ["CARETAKER", "InUseError", "activity_at", "demand_quiet"]

CARETAKER = "finetune ckpt"
"""How the owner of a fence begins that is taken by hand."""
QUIET = timedelta(hours=1)
_PAUSES = 3
_UNREADABLE = (BadDocumentError, StorageMissingError, StorageTornError)


class InUseError(TrainerError):
    """A run seems to be at work, and what was asked for would end it."""


def activity_at(storage: Storage, now: datetime) -> Activity | None:
    """Of the attempt with the newest fence; None where there was never one."""
    epoch = current_epoch(storage)
    if epoch == 0:
        return None
    try:
        fence = parse(storage.read(layout.fence(epoch)), Fence)
    except _UNREADABLE:
        unknown = "an attempt whose fence cannot be read"
        return Activity(owner=unknown, epoch=epoch, quiet_seconds=QUIET.total_seconds(), at_work=True)
    signs = sorted([fence.created, *_saves(storage, epoch)])
    longest = max((later - earlier for earlier, later in pairwise(signs)), default=timedelta(0))
    quiet = max(QUIET, _PAUSES * longest)
    return Activity(
        owner=fence.owner,
        epoch=epoch,
        last_sign=signs[-1],
        quiet_seconds=quiet.total_seconds(),
        at_work=not fence.owner.startswith(CARETAKER) and now - signs[-1] < quiet,
    )


def demand_quiet(activity: Activity | None, now: datetime) -> None:
    """Raises InUseError when a run seems to be at work."""
    if activity is None or not activity.at_work:
        return
    wait = ""
    if activity.last_sign is not None:
        left = activity.last_sign + timedelta(seconds=activity.quiet_seconds) - now
        wait = f" Its last sign of life was at {activity.last_sign:%Y-%m-%d %H:%M:%S %Z}; it counts as ended after"
        wait += f" {max(round(left.total_seconds() / 60), 1)} more minutes of silence."
    raise InUseError(
        f"{activity.owner} seems to be at work there (attempt {activity.epoch}).{wait}"
        " When you know that it has ended, say --take-over: should it be alive after all, it will not save any more"
    )


def _saves(storage: Storage, epoch: int) -> Iterator[datetime]:
    """When each checkpoint of an attempt was begun that is still there."""
    for checkpoint in listed(storage):
        if checkpoint.epoch == epoch:
            try:
                yield parse(storage.read(layout.intent(checkpoint)), Intent).created
            except _UNREADABLE:
                continue
