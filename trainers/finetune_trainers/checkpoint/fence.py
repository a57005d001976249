"""Which attempt may publish: the one with the highest fence.

Every attempt (each start of a worker group) takes the next number by creating the file of that name, which of all who
try at once only one can. The files stay; nothing is changed in place, and their list is the history of the run.

An attempt that lost contact for an hour and wakes up finds the file after its own, and stops. It might also fall
asleep between looking and publishing. Hence the order of `commit`: a publisher looks at the fence when all receipts are
in the storage already, and a new attempt, once it has its fence, closes every checkpoint that older ones left open by
putting a word in the manifest's place. Whoever looked before the new fence has its folder closed; whoever looks later
sees the fence. No clock and no lease has a part in this.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime

from finetune_api.base import Contract
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import BadDocumentError, parse, sealed
from finetune_trainers.checkpoint.storage.errors import StorageConflictError, StorageMissingError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import TrainerError

__all__ = ["Fence", "SupersededError", "current_epoch", "demand_fence", "take_fence"]


class Fence(Contract):
    """An attempt's right to publish."""

    kind: Literal["fence"] = "fence"
    version: Literal[1] = 1
    epoch: int
    token: str
    """Of this attempt alone."""
    owner: str
    """Who it is, for people: job, attempt, host."""
    created: AwareDatetime
    """For people; nothing is decided by it."""


class SupersededError(TrainerError):
    """A newer attempt has taken over; this one has nothing more to save."""


def current_epoch(storage: Storage) -> int:
    """The highest fence taken; 0 when there is none."""
    epochs = (layout.epoch_of(stored.name) for stored in storage.list(layout.FENCES))
    return max((epoch for epoch in epochs if epoch is not None), default=0)


def take_fence(storage: Storage, owner: str, now: datetime) -> Fence:
    """The next fence, which ends the right of every earlier attempt."""
    epoch = current_epoch(storage)
    while True:
        epoch += 1
        fence = Fence(epoch=epoch, token=secrets.token_hex(8), owner=owner, created=now)
        try:
            storage.create(layout.fence(epoch), sealed(fence))
        except StorageConflictError:
            continue  # taken since the listing
        return fence


def demand_fence(storage: Storage, fence: Fence) -> None:
    """Raises SupersededError when a newer attempt has begun."""
    if storage.size(layout.fence(fence.epoch + 1)) is not None:
        newest = current_epoch(storage)
        raise SupersededError(
            f"attempt {fence.epoch} of the run was superseded by attempt {newest}; it publishes nothing"
        )
    if storage.exclusive:
        return
    try:
        mine = parse(storage.read(layout.fence(fence.epoch)), Fence) == fence
    except (StorageMissingError, BadDocumentError):
        mine = False
    if not mine:
        raise SupersededError(f"another attempt has taken the number {fence.epoch}; this one publishes nothing")
