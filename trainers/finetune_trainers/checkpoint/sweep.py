"""Deletes what retention does not keep, and what dead attempts left. Called after a commit, never before one.

A checkpoint is deleted in an order in which it is at no moment a damaged one: the tombstone, which hides it; the
manifest; the other files; the tombstone. A crash on the way leaves a tombstone, and the next sweep goes on from there.
One that is pinned at the last moment is given back (`pins`). On a full disk there is no room for a tombstone, and the
manifest goes first: a crash then leaves an open folder, which the next attempt completes or closes.

What was abandoned is no checkpoint and needs no tombstone: the word that it is goes last.

Blobs are swept by marking: what no manifest and no open intent names goes. Only the holder of the fence may do that,
since only it knows that nobody is about to name a blob which is there already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from finetune_api.base import Contract
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import BadDocumentError, parse, sealed
from finetune_trainers.checkpoint.fence import Fence, current_epoch, demand_fence
from finetune_trainers.checkpoint.find import read_manifest, verified
from finetune_trainers.checkpoint.identity import trainings
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.manifest import Abandoned, Intent, Manifest
from finetune_trainers.checkpoint.pins import is_pinned
from finetune_trainers.checkpoint.retention import Candidate, Retention, Verdict, choose
from finetune_trainers.checkpoint.storage.errors import (
    StorageConflictError,
    StorageFullError,
    StorageMissingError,
    StorageTornError,
)
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["SweepPlan", "Swept", "Tombstone", "clear_leftovers", "plan_sweep", "sweep"]

_DAY = 86_400.0
_NEVER = "it was never completed"


class Tombstone(Contract):
    """A checkpoint is being deleted."""

    kind: Literal["tombstone"] = "tombstone"
    version: Literal[1] = 1
    reason: str


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would do."""

    verdicts: tuple[Verdict, ...]
    """For every checkpoint, newest first."""
    leftovers: tuple[CheckpointId, ...]
    """Folders that are no checkpoints and will never be: abandoned, or half deleted."""
    blobs: tuple[str, ...]
    """Names of blobs that nothing refers to."""


@dataclass(frozen=True)
class Swept:
    """What a sweep did."""

    plan: SweepPlan
    deleted: tuple[CheckpointId, ...]
    num_bytes: int
    num_unfinished: int | None = None
    """Files and uploads, a day old, whose writers died; None when the storage does not tell."""


def plan_sweep(
    storage: Storage, policy: Retention, fence: Fence | None = None, protected: Collection[CheckpointId] = ()
) -> SweepPlan:
    """What `sweep` would do now. Reads, and changes nothing."""
    folders = listed(storage)
    pins = {layout.pinned(stored.name) for stored in storage.list(layout.PINS)}
    settled: list[tuple[Listing, Intent | None]] = []
    leftovers, manifests = [], []
    for listing in folders.values():
        if listing.is_deleting or _is_dead(storage, listing):
            leftovers.append(listing.checkpoint)
        elif listing.is_settled:
            found = read_manifest(storage, listing.checkpoint)
            if isinstance(found, Abandoned):
                leftovers.append(listing.checkpoint)
                continue
            if isinstance(found, Manifest):
                manifests.append(found)
            settled.append((listing, found.intent if isinstance(found, Manifest) else _intent(storage, listing)))
    numbers = trainings(intent for _, intent in settled)
    candidates = [_candidate(*one, pins, number) for one, number in zip(settled, numbers, strict=True)]
    verdicts = choose(candidates, policy, _newest_whole(storage, folders, candidates), protected)
    kept = {verdict.id for verdict in verdicts if verdict.keep}
    readable = {manifest.id for manifest in manifests}
    blobs = _orphans(storage, folders, manifests, kept) if fence is not None and kept <= readable else ()
    return SweepPlan(tuple(verdicts), tuple(leftovers), blobs)


def sweep(
    storage: Storage, policy: Retention, fence: Fence | None = None, protected: Collection[CheckpointId] = ()
) -> Swept:
    """Delete what may go. With `fence`, which must be the run's newest, blobs too: else SupersededError."""
    if fence is not None:
        demand_fence(storage, fence)
    plan = plan_sweep(storage, policy, fence, protected)
    folders, deleted, num_bytes = listed(storage), [], 0
    unwanted = {verdict.id: "; ".join(verdict.reasons) for verdict in plan.verdicts if not verdict.keep}
    # The oldest first: what a crash leaves is then what one would have kept.
    unwanted |= dict.fromkeys(plan.leftovers, _NEVER)
    for checkpoint, reason in sorted(unwanted.items()):
        if fence is not None:
            demand_fence(storage, fence)
        is_leftover = checkpoint in plan.leftovers
        if checkpoint in folders and _delete(storage, folders[checkpoint], reason, is_leftover):
            deleted.append(checkpoint)
            num_bytes += sum(folders[checkpoint].sizes.values())
    if fence is not None and plan.blobs and len(deleted) == len(unwanted):  # what stayed after all has its blobs
        demand_fence(storage, fence)
        storage.delete(plan.blobs)
    unfinished = storage.unfinished(_DAY)
    if unfinished:
        storage.discard(unfinished)
    return Swept(plan, tuple(deleted), num_bytes, None if unfinished is None else len(unfinished))


def clear_leftovers(storage: Storage) -> int:
    """Delete what is no checkpoint and will never be -> its bytes. Needs no fence, and no room where there is none."""
    freed = 0
    for listing in listed(storage).values():
        if _is_leftover(storage, listing) and _delete(storage, listing, _NEVER, is_leftover=True):
            freed += sum(listing.sizes.values())
    return freed


def _is_leftover(storage: Storage, listing: Listing) -> bool:
    if listing.is_settled:
        return isinstance(read_manifest(storage, listing.checkpoint), Abandoned)
    return listing.is_deleting or _is_dead(storage, listing)


def _candidate(
    listing: Listing, intent: Intent | None, pins: Collection[CheckpointId | None], training: int
) -> Candidate:
    metrics = dict(intent.metrics) if intent else {}
    size = sum(listing.sizes.values())
    return Candidate(listing.checkpoint, size, metrics, listing.checkpoint in pins, training)


def _intent(storage: Storage, listing: Listing) -> Intent | None:
    """Of a checkpoint whose manifest cannot be read; None when it cannot be either."""
    try:
        return parse(storage.read(layout.intent(listing.checkpoint)), Intent)
    except (BadDocumentError, StorageMissingError, StorageTornError):
        return None


def _newest_whole(
    storage: Storage, folders: dict[CheckpointId, Listing], candidates: Iterable[Candidate]
) -> list[CheckpointId]:
    """Of each training, of which the newest are first."""
    found: dict[int, CheckpointId] = {}
    for one in candidates:
        if one.training not in found and isinstance(verified(storage, folders[one.id]), Manifest):
            found[one.training] = one.id
    return list(found.values())


def _is_dead(storage: Storage, listing: Listing) -> bool:
    """Open for ever. Where creating is exclusive the next attempt closes such folders itself."""
    return listing.is_open and not storage.exclusive and listing.checkpoint.epoch < current_epoch(storage)


def _orphans(
    storage: Storage,
    folders: dict[CheckpointId, Listing],
    manifests: list[Manifest],
    kept: Collection[CheckpointId],
) -> tuple[str, ...]:
    intents = [manifest.intent for manifest in manifests if manifest.id in kept]
    for listing in folders.values():
        if listing.is_open:
            try:
                intents.append(parse(storage.read(layout.intent(listing.checkpoint)), Intent))
            except StorageMissingError:
                continue  # nothing can be published in it
            except BadDocumentError:
                return ()  # no telling what it would name
    named = {layout.blob(blob.digest) for intent in intents for blob in intent.blobs}
    return tuple(sorted(stored.name for stored in storage.list(layout.BLOBS) if stored.name not in named))


def _delete(storage: Storage, listing: Listing, reason: str, is_leftover: bool) -> bool:
    """-> False when it is pinned, and stays."""
    tombstone, manifest = layout.tombstone(listing.checkpoint), layout.manifest(listing.checkpoint)
    is_abandoned = is_leftover and listing.is_settled
    if not is_abandoned:
        if not _doom(storage, listing, reason):
            return False
        storage.delete([manifest])
    storage.delete([name for name in listing.sizes if name not in (manifest, tombstone)])
    storage.delete([manifest if is_abandoned else tombstone])
    storage.prune(layout.folder(listing.checkpoint))
    return True


def _doom(storage: Storage, listing: Listing, reason: str) -> bool:
    """Put the tombstone there -> False when the checkpoint is pinned. Where the manifest is gone other files may be
    gone too, and no pin brings them back."""
    name, is_mine = layout.tombstone(listing.checkpoint), False
    can_stay = layout.manifest(listing.checkpoint) in listing.sizes
    if can_stay and is_pinned(storage, listing.checkpoint):
        return False
    if name not in listing.sizes:
        with suppress(StorageConflictError, StorageFullError):  # another sweep is at it; or there is no room
            storage.create(name, sealed(Tombstone(reason=reason)))
            is_mine = True
    if can_stay and is_pinned(storage, listing.checkpoint):  # since the look before
        if is_mine:
            storage.delete([name])
        return False
    return True
