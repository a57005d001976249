"""From the receipts of all ranks to a checkpoint. Called by the coordinator, and by the next attempt for what it left.

    begin       take the fence; complete or close what earlier attempts left open
    announce    the intent (`write`)
    write_rank  every rank: files, then receipt (`write`)
    publish     receipts of all ranks, tiling, sizes; the fence; MANIFEST.json, created and never replaced; HEAD.json

The order within `publish` matters: see `fence`. A manifest follows from intent and receipts alone, so that an attempt
which finds all receipts of its dead predecessor can complete the checkpoint, to the byte.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from pydantic import JsonValue

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.assembly import assembly_faults
from finetune_trainers.checkpoint.documents import BadDocumentError, canonical, parse, sealed
from finetune_trainers.checkpoint.fence import Fence, SupersededError, demand_fence, take_fence
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.manifest import Abandoned, Intent, Manifest, Receipt, parse_manifest
from finetune_trainers.checkpoint.storage.errors import (
    StorageConflictError,
    StorageError,
    StorageFullError,
    StorageMissingError,
)
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import clear_leftovers

__all__ = [
    "IncompleteError",
    "Settled",
    "abandon",
    "assembled",
    "begin",
    "conclude",
    "pointer",
    "publish",
    "settle_own",
]

Document = TypeVar("Document", Intent, Receipt)

_THREADS = 16
_log = logging.getLogger(__name__)


class IncompleteError(StorageError):
    """What the ranks have written does not make a checkpoint; the message says why."""


@dataclass(frozen=True)
class Settled:
    """What a new attempt did with checkpoints that earlier ones had not finished."""

    completed: tuple[CheckpointId, ...]
    closed: tuple[CheckpointId, ...]


def begin(storage: Storage, owner: str, now: datetime) -> tuple[Fence, Settled]:
    """Start an attempt. After it, no earlier attempt can publish, and what can be saved of their work is.

    A writer that outlived its trainer may still be finishing: callers who know of one wait for it first.
    """
    try:
        fence = take_fence(storage, owner, now)
    except StorageFullError:
        if not clear_leftovers(storage):
            raise
        fence = take_fence(storage, owner, now)
    completed, closed = [], []
    for checkpoint, listing in listed(storage).items():
        if checkpoint.epoch < fence.epoch and listing.is_open:
            try:
                _complete(storage, checkpoint, listing)
                completed.append(checkpoint)
            except IncompleteError as error:
                if _close(storage, checkpoint, fence, error.message):
                    closed.append(checkpoint)
    return fence, Settled(tuple(completed), tuple(closed))


def publish(storage: Storage, fence: Fence, checkpoint: CheckpointId) -> Manifest:
    """Make a checkpoint of what all ranks have written.

    Raises IncompleteError when it is not whole, SupersededError when a newer attempt has begun; then nothing was
    published. Any other StorageError leaves open whether it was: calling again tells.
    """
    manifest, data = assembled(storage, checkpoint, listed(storage, checkpoint)[checkpoint])
    demand_fence(storage, fence)
    _create_manifest(storage, manifest, data)
    _point_at(storage, manifest)
    return manifest


def conclude(storage: Storage, fence: Fence, checkpoint: CheckpointId) -> Manifest:
    """`publish`, or close it for good: after a StorageError it was not published, wherever the storage can tell."""
    try:
        return publish(storage, fence, checkpoint)
    except IncompleteError:
        raise
    except StorageError as error:
        if _close(storage, checkpoint, fence, error.message):
            raise
        return publish(storage, fence, checkpoint)  # it was, or may be: only the answer was lost


def settle_own(storage: Storage, fence: Fence, before: CheckpointId) -> None:
    """Complete or close what a coordinator of this very attempt left open when it died. `before`: what its successor
    saves first, of which other ranks may have written their part. Raises SupersededError."""
    for checkpoint, listing in listed(storage).items():
        if checkpoint.epoch == fence.epoch and checkpoint < before and listing.is_open:
            try:
                publish(storage, fence, checkpoint)
            except IncompleteError as error:
                _close(storage, checkpoint, fence, error.message)


def abandon(storage: Storage, fence: Fence, checkpoint: CheckpointId, reason: str) -> bool:
    """Give up a checkpoint of one's own, so that its files can be swept -> False when it is published already."""
    return _close(storage, checkpoint, fence, reason)


def assembled(storage: Storage, checkpoint: CheckpointId, listing: Listing) -> tuple[Manifest, bytes]:
    """The manifest that intent and receipts make, and its file's content. Raises IncompleteError."""
    intent = _document(storage, layout.intent(checkpoint), Intent)
    if intent.id != checkpoint:
        raise IncompleteError(f"{layout.intent(checkpoint)} is of {intent.id}")
    names = [layout.receipt(checkpoint, rank) for rank in listing.ranks if rank < intent.world.size]
    with ThreadPoolExecutor(_THREADS) as pool:
        receipts = list(pool.map(lambda name: _document(storage, name, Receipt), names))
    faults = assembly_faults(intent, receipts) or list(_absences(storage, intent, receipts, listing.sizes))
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise IncompleteError(f"{checkpoint} is not whole: {'; '.join(faults[:5])}{more}")
    manifest = Manifest(intent=intent, receipts=tuple(sorted(receipts, key=lambda receipt: receipt.rank)))
    return manifest, sealed(manifest)


def _document(storage: Storage, name: str, model: type[Document]) -> Document:
    try:
        return parse(storage.read(name), model)
    except StorageMissingError:
        raise IncompleteError(f"{name} is missing") from None
    except BadDocumentError as error:
        raise IncompleteError(f"{name} {error}") from None


def _absences(storage: Storage, intent: Intent, receipts: Sequence[Receipt], sizes: Mapping[str, int]) -> Iterator[str]:
    """Files that the listing does not have as the receipts do."""
    for receipt in receipts:
        for file, size in receipt.files():
            found = sizes.get(layout.folder(intent.id) + file)
            if found is None:
                yield f"{file} is missing"
            elif found != size:
                yield f"{file} has {found} bytes where its receipt says {size}"
    for blob in intent.blobs:
        if storage.size(layout.blob(blob.digest)) != blob.bytes:
            yield f"the blob {blob.digest} ({blob.name}) is not there whole"


def _create_manifest(storage: Storage, manifest: Manifest, data: bytes) -> None:
    name = layout.manifest(manifest.id)
    try:
        storage.create(name, data)
    except StorageConflictError:
        found = storage.read(name)
        if found == data:
            return  # the answer to our own was lost, or the next attempt has completed this one
        raise SupersededError(f"{name} cannot be published: {_say(found)}") from None


def _say(data: bytes) -> str:
    try:
        found = parse_manifest(data)
    except BadDocumentError as error:
        return f"what is there {error}"
    if isinstance(found, Abandoned):
        return f"attempt {found.epoch} has closed it ({found.reason})"
    return "another one was published in its place"


def _complete(storage: Storage, checkpoint: CheckpointId, listing: Listing) -> None:
    """Publish for an earlier attempt. IncompleteError when that cannot be done."""
    manifest, data = assembled(storage, checkpoint, listing)
    try:
        _create_manifest(storage, manifest, data)
    except SupersededError as error:
        raise IncompleteError(error.message) from None


def _close(storage: Storage, checkpoint: CheckpointId, fence: Fence, reason: str) -> bool:
    """Put the word that it is abandoned in the manifest's place -> False when a manifest is there."""
    if not storage.exclusive:
        return False  # it could replace a manifest that is published at this moment
    try:
        storage.create(layout.manifest(checkpoint), sealed(Abandoned(epoch=fence.epoch, reason=reason[:500])))
    except StorageConflictError:
        try:
            return isinstance(parse_manifest(storage.read(layout.manifest(checkpoint))), Abandoned)
        except BadDocumentError:
            return False
    return True


def pointer(manifest: Manifest) -> bytes:
    """The content of HEAD.json when this is the last commit."""
    content: dict[str, JsonValue] = {
        "checkpoint": str(manifest.id),
        "step": manifest.id.step,
        "epoch": manifest.id.epoch,
        "bytes": manifest.bytes,
        "world": manifest.intent.world.size,
    }
    return canonical(content)


def _point_at(storage: Storage, manifest: Manifest) -> None:
    """HEAD.json, which nothing depends on: a failure is told and no more."""
    try:
        storage.replace(layout.HEAD, pointer(manifest))
    except StorageError as error:
        _log.warning("%s is published, but %s could not be written: %s", manifest.id, layout.HEAD, error)
