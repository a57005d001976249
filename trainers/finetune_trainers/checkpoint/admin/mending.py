"""`finetune ckpt repair`: puts a place in order without deleting anything that could be data.

    complete   what dead attempts had written whole is published, from intent and receipts
    close      what they had not is given up, so that a later sweep may delete it
    revive     a pinned checkpoint whose tombstone is there while all its files are is taken back
    mend       intent, receipts and manifest follow from one another: a damaged one is written again from the others
    head       HEAD.json names the newest whole checkpoint

Shards and shared files are never touched: what is wrong with them is reported. Completing and closing take the fence,
so a run that seems to be at work is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from finetune_api.base import Contract
from finetune_api.checkpoints import Damages, Difference, Mended, Reasoned, Repair
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.activity import activity_at, demand_quiet
from finetune_trainers.checkpoint.admin.choosing import published
from finetune_trainers.checkpoint.admin.upkeep import Mandate
from finetune_trainers.checkpoint.admin.verifying import damages_of
from finetune_trainers.checkpoint.commit import IncompleteError, assembled, begin, pointer
from finetune_trainers.checkpoint.documents import sealed
from finetune_trainers.checkpoint.find import Rejected, find_newest, read_manifest, verified
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.manifest import Abandoned, Manifest
from finetune_trainers.checkpoint.pins import is_pinned
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.overlay import OverlayStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.verify import quick_damages

__all__ = ["repaired"]


@dataclass
class _Done:
    completed: list[str] = field(default_factory=list)
    closed: list[Reasoned] = field(default_factory=list)
    revived: list[str] = field(default_factory=list)
    mended: list[Mended] = field(default_factory=list)
    damaged: list[Damages] = field(default_factory=list)


def repaired(storage: Storage, mandate: Mandate) -> Repair:
    """Put things in order, or say what would be done. Raises InUseError when there is something to complete or close
    while a run seems to be at work, and StorageError."""
    activity = activity_at(storage, mandate.now)
    place: Storage = OverlayStorage(storage) if mandate.dry_run else storage
    done = _Done()
    _revive(place, done)
    if any(listing.is_open for listing in listed(place).values()):
        if not mandate.dry_run and not mandate.take_over:
            demand_quiet(activity, mandate.now)
        _settle(place, mandate, done)
    _mend(place, done)
    return Repair(
        uri=storage.uri,
        dry_run=mandate.dry_run,
        completed=done.completed,
        closed=done.closed,
        revived=done.revived,
        mended=done.mended,
        head=_point(place),
        damaged=done.damaged,
        activity=activity,
    )


def _revive(storage: Storage, done: _Done) -> None:
    """A manifest is the first thing that a deletion takes: while it is there, all is."""
    for checkpoint, listing in listed(storage).items():
        if listing.is_deleting and layout.manifest(checkpoint) in listing.sizes and is_pinned(storage, checkpoint):
            storage.delete([layout.tombstone(checkpoint)])
            done.revived.append(str(checkpoint))


def _settle(storage: Storage, mandate: Mandate, done: _Done) -> None:
    _, settled = begin(storage, mandate.owner, mandate.now)
    done.completed += map(str, settled.completed)
    for checkpoint in settled.closed:
        found = read_manifest(storage, checkpoint)
        reason = found.reason if isinstance(found, Abandoned) else "not whole"
        reason = reason.removeprefix(f"{checkpoint} is not whole: ")
        size = sum(listed(storage, checkpoint)[checkpoint].sizes.values())
        done.closed.append(Reasoned(id=str(checkpoint), reason=reason, bytes=size))


def _mend(storage: Storage, done: _Done) -> None:
    for checkpoint, listing in published(storage).items():
        found = read_manifest(storage, checkpoint)
        if isinstance(found, Rejected):
            _rebuild_manifest(storage, checkpoint, listing, done)
        elif isinstance(found, Manifest):
            done.mended += _rewrite_documents(storage, found, listing)
        judged = verified(storage, listed(storage, checkpoint)[checkpoint])
        if isinstance(judged, Rejected):
            done.damaged.append(damages_of(checkpoint, judged.damages))


def _rebuild_manifest(storage: Storage, checkpoint: CheckpointId, listing: Listing, done: _Done) -> None:
    try:
        _, data = assembled(storage, checkpoint, listing)
    except IncompleteError:
        return  # reported as damaged
    storage.replace(layout.manifest(checkpoint), data)
    done.mended.append(Mended(file=layout.manifest(checkpoint), what="written again from intent and receipts"))


def _rewrite_documents(storage: Storage, manifest: Manifest, listing: Listing) -> Iterator[Mended]:
    """Intent and receipts as the manifest has them, where they are damaged or missing."""
    wrong = {damage.file for damage in quick_damages(storage, manifest, listing.sizes)}
    if layout.manifest(manifest.id) in wrong:
        return  # it contradicts itself: nothing follows from it
    documents: list[tuple[str, Contract]] = [(layout.intent(manifest.id), manifest.intent)]
    documents += [(layout.receipt(manifest.id, receipt.rank), receipt) for receipt in manifest.receipts]
    for name, document in documents:
        if name in wrong:
            storage.replace(name, sealed(document))
            yield Mended(file=name, what="written again from the manifest")


def _point(storage: Storage) -> Difference | None:
    """Make HEAD.json right. Where no checkpoint is whole it stays as it is: nothing is decided by it."""
    newest = find_newest(storage).manifest
    if newest is None:
        return None
    right = pointer(newest)
    try:
        before: bytes | None = storage.read(layout.HEAD)
    except (StorageMissingError, StorageTornError):
        before = None
    if before == right:
        return None
    storage.replace(layout.HEAD, right)
    shown = None if before is None else before[:200].decode(errors="replace")
    return Difference(what=layout.HEAD, a=shown, b=right.decode())
