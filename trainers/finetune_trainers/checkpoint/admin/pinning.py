"""`finetune ckpt pin` and `unpin`."""

from __future__ import annotations

from datetime import datetime

from finetune_api.checkpoints import PinReport
from finetune_trainers.checkpoint.admin.choosing import UnknownCheckpointError, chosen, manifest_of
from finetune_trainers.checkpoint.admin.looking import pin_summary
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.pins import pin, read_pins, unpin
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["pinned", "to_unpin", "unpinned"]


def pinned(storage: Storage, checkpoint: CheckpointId, by: str, reason: str, now: datetime) -> PinReport:
    """Raises UnknownCheckpointError for what is no checkpoint, StorageError when it is being deleted."""
    manifest_of(storage, checkpoint)
    made, is_new = pin(storage, checkpoint, by, reason, now)
    return PinReport(id=str(checkpoint), pinned=True, changed=is_new, pin=pin_summary(made))


def unpinned(storage: Storage, checkpoint: CheckpointId) -> PinReport:
    return PinReport(id=str(checkpoint), pinned=False, changed=unpin(storage, checkpoint))


def to_unpin(storage: Storage, text: str) -> CheckpointId:
    """The checkpoint that `text` means; by its whole name also one that is gone and whose pin was left. Raises
    UnknownCheckpointError."""
    try:
        return chosen(storage, text)
    except UnknownCheckpointError:
        for checkpoint in read_pins(storage):
            if str(checkpoint) == text:
                return checkpoint
        raise
