"""The checkpoint folders of a run as one listing has them: what state each is in, before any file is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["Listing", "listed"]


@dataclass(frozen=True)
class Listing:
    """One checkpoint's folder."""

    checkpoint: CheckpointId
    sizes: Mapping[str, int]
    """Full name -> bytes, of every file in it."""

    @property
    def is_deleting(self) -> bool:
        return layout.tombstone(self.checkpoint) in self.sizes

    @property
    def is_settled(self) -> bool:
        """It is a checkpoint or has been abandoned; reading the file tells which."""
        return layout.manifest(self.checkpoint) in self.sizes and not self.is_deleting

    @property
    def is_open(self) -> bool:
        """Begun, and neither published nor abandoned."""
        return layout.manifest(self.checkpoint) not in self.sizes and not self.is_deleting

    @property
    def ranks(self) -> list[int]:
        """Those that have left a receipt."""
        found = (layout.rank_of_receipt(name) for name in self.sizes)
        return sorted(rank for rank in found if rank is not None)


def listed(storage: Storage, only: CheckpointId | None = None) -> dict[CheckpointId, Listing]:
    """All folders, newest first; or `only` one, which is then there even if it is empty."""
    found: defaultdict[CheckpointId, dict[str, int]] = defaultdict(dict)
    if only is not None:
        found[only] = {}
    for stored in storage.list(layout.folder(only) if only is not None else layout.CHECKPOINTS):
        checkpoint = layout.checkpoint_of(stored.name)
        if checkpoint is not None:
            found[checkpoint][stored.name] = stored.bytes
    return {checkpoint: Listing(checkpoint, found[checkpoint]) for checkpoint in sorted(found, reverse=True)}
