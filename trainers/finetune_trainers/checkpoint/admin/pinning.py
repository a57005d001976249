"""`finetune ckpt pin` and `unpin`."""

from __future__ import annotations

from datetime import datetime

from finetune_api.checkpoints import PinReport
from finetune_trainers.checkpoint.admin.choosing import manifest_of
from finetune_trainers.checkpoint.admin.looking import pin_summary
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.pins import pin, unpin
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["pinned", "unpinned"]


def pinned(storage: Storage, checkpoint: CheckpointId, by: str, reason: str, now: datetime) -> PinReport:
    """Raises UnknownCheckpointError for what is no checkpoint, StorageError when it is being deleted."""
    manifest_of(storage, checkpoint)
    made, is_new = pin(storage, checkpoint, by, reason, now)
    return PinReport(id=str(checkpoint), pinned=True, changed=is_new, pin=pin_summary(made))


def unpinned(storage: Storage, checkpoint: CheckpointId) -> PinReport:
    return PinReport(id=str(checkpoint), pinned=False, changed=unpin(storage, checkpoint))
