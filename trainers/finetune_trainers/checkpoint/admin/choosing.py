"""Which checkpoint is meant: `newest`, a step (`200`), a step of an attempt (`200-e1`), or the whole name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.find import find_newest, read_manifest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.manifest import Abandoned, Manifest
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = [
    "NEWEST",
    "UnknownCheckpointError",
    "chosen",
    "manifest_of",
    "published",
    "unless_deleted",
    "was_deleted",
]

NEWEST = "newest"
_SHORT = re.compile(r"(\d{1,18})(?:-e(\d{1,9}))?")


class UnknownCheckpointError(UserError):
    """There is no such checkpoint; `known` are those that there are."""

    def __init__(self, message: str, known: Collection[CheckpointId] = ()) -> None:
        super().__init__(message)
        self.known = [str(checkpoint) for checkpoint in known]


def published(storage: Storage) -> dict[CheckpointId, Listing]:
    """Folders with a manifest, newest first. Some may turn out to be abandoned or damaged."""
    return {checkpoint: listing for checkpoint, listing in listed(storage).items() if listing.is_settled}


def chosen(storage: Storage, text: str) -> CheckpointId:
    """The checkpoint that `text` means, published or not; of several attempts that saved a step the newest.

    `newest` is the one that a run would go on from. Raises UnknownCheckpointError.
    """
    if text == NEWEST:
        return _newest(storage)
    known = list(listed(storage))
    found = _SHORT.fullmatch(text)
    if found is None:
        raise UnknownCheckpointError(
            f"{text!r} names no checkpoint; say {NEWEST}, a step such as 200, or a name such as 0000000200-e00001",
            known,
        )
    step, epoch = int(found[1]), int(found[2]) if found[2] else None
    for checkpoint in known:
        if checkpoint.step == step and epoch in (None, checkpoint.epoch):
            return checkpoint
    raise UnknownCheckpointError(f"there is no checkpoint {text} at {storage.uri}", known)


def manifest_of(storage: Storage, checkpoint: CheckpointId) -> Manifest:
    """The manifest of a published checkpoint. UnknownCheckpointError when it is none, or cannot be read."""
    listing = listed(storage, checkpoint)[checkpoint]
    if not listing.is_settled:
        what = "is being deleted" if listing.is_deleting else "was never finished"
        raise UnknownCheckpointError(f"{checkpoint} is no checkpoint: it {what}", published(storage))
    found = read_manifest(storage, checkpoint)
    if isinstance(found, Abandoned):
        raise UnknownCheckpointError(f"{checkpoint} is no checkpoint: it was given up ({found.reason})")
    if not isinstance(found, Manifest):
        name = layout.manifest(checkpoint)
        raise UnknownCheckpointError(f"{name} cannot be read: {found.damages[0].what}; finetune ckpt repair may help")
    return found


def was_deleted(storage: Storage, checkpoint: CheckpointId) -> bool:
    """Whether a checkpoint that was there is gone, or going."""
    listing = listed(storage, checkpoint)[checkpoint]
    return listing.is_deleting or not listing.sizes


@contextmanager
def unless_deleted(storage: Storage, checkpoint: CheckpointId) -> Iterator[None]:
    """Around what reads a checkpoint: when a run deletes it meanwhile, UnknownCheckpointError says so instead of a
    damage that is none."""
    try:
        yield
    except (StorageMissingError, StorageTornError):
        if not was_deleted(storage, checkpoint):
            raise
        raise UnknownCheckpointError(
            f"{checkpoint} was deleted while it was read, as a run does with old ones; finetune ckpt pin keeps one",
            published(storage),
        ) from None


def _newest(storage: Storage) -> CheckpointId:
    search = find_newest(storage)
    if search.manifest is not None:
        return search.manifest.id
    if search.rejected:
        known = [rejected.checkpoint for rejected in search.rejected]
        raise UnknownCheckpointError(f"no checkpoint at {storage.uri} is whole: {search.rejected[0]}", known)
    raise UnknownCheckpointError(f"there is no checkpoint at {storage.uri}", list(listed(storage)))
