"""Pins: a person's word that a checkpoint stays, whatever retention says. `finetune ckpt pin` makes them.

A pin is a small document of its own, `pins/<checkpoint>.json`: created once, never changed, deleted to unpin. No
checkpoint is touched. `retention` lets no rule and no quota overrule it, and one whose document is damaged counts too.

A sweep may be about to delete what is being pinned. Each of the two leaves its mark first and looks for the other's
afterwards: a sweep puts the tombstone and then looks for a pin, `pin` puts the pin and then looks for a tombstone.
So at least one of them sees the other and gives way, and no pin is promised for a checkpoint that goes.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Literal

from pydantic import AwareDatetime

from finetune_api.base import Contract
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import BadDocumentError, parse, sealed
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.storage.errors import StorageConflictError, StorageMissingError
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["Pin", "is_pinned", "pin", "read_pins", "unpin"]


class Pin(Contract):
    """Somebody's wish that a checkpoint stays."""

    kind: Literal["pin"] = "pin"
    version: Literal[1] = 1
    by: str
    """Who asked for it."""
    reason: str = ""
    created: AwareDatetime
    """For people; nothing is decided by it."""


def pin(storage: Storage, checkpoint: CheckpointId, by: str, reason: str, now: datetime) -> tuple[Pin, bool]:
    """Keep a checkpoint until it is unpinned -> its pin, and whether it is a new one: an older pin stays as it is.

    Raises StorageMissingError when the checkpoint is not there, or is being deleted at this moment.
    """
    made, is_new = Pin(by=by, reason=reason, created=now), True
    try:
        storage.create(layout.pin(checkpoint), sealed(made))
    except StorageConflictError:
        is_new = False
    if not _stays(storage, checkpoint):
        if is_new:
            unpin(storage, checkpoint)
        raise StorageMissingError(f"checkpoint {checkpoint} is not there, or is being deleted: it cannot be pinned")
    return (made, True) if is_new else (_read(storage, checkpoint) or made, False)


def unpin(storage: Storage, checkpoint: CheckpointId) -> bool:
    """Leave a checkpoint to retention again -> whether it was pinned."""
    was_pinned = is_pinned(storage, checkpoint)
    storage.delete([layout.pin(checkpoint)])
    return was_pinned


def is_pinned(storage: Storage, checkpoint: CheckpointId) -> bool:
    return storage.size(layout.pin(checkpoint)) is not None


def read_pins(storage: Storage) -> dict[CheckpointId, Pin | None]:
    """All pins; None stands for one that holds its checkpoint and cannot be read."""
    names = (layout.pinned(stored.name) for stored in storage.list(layout.PINS))
    return {checkpoint: _read(storage, checkpoint) for checkpoint in names if checkpoint is not None}


def _stays(storage: Storage, checkpoint: CheckpointId) -> bool:
    is_deleting = storage.size(layout.tombstone(checkpoint)) is not None
    return not is_deleting and storage.size(layout.manifest(checkpoint)) is not None


def _read(storage: Storage, checkpoint: CheckpointId) -> Pin | None:
    with suppress(BadDocumentError, StorageMissingError):
        return parse(storage.read(layout.pin(checkpoint)), Pin)
    return None
