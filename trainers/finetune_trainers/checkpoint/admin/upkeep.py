"""`finetune ckpt gc`: what retention and a sweep delete, by hand and on request.

It does what the next attempt would do when it begins and after its first save: takes the fence, publishes what dead
attempts had written whole, gives up the rest, then deletes what no rule keeps. The fence is taken only where something
depends on it: for unfinished checkpoints and for shared files. Then an attempt that is alive after all saves no more,
which is why a run that seems to be at work is left alone (`activity`).

A dry run is the same code on a storage that makes no changes (`OverlayStorage`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from finetune_api.checkpoints import Collection, Reasoned
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.activity import CARETAKER, activity_at, demand_quiet
from finetune_trainers.checkpoint.commit import Settled, begin
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.errors import StorageFullError
from finetune_trainers.checkpoint.storage.overlay import OverlayStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import Swept, sweep

__all__ = ["Mandate", "collected"]

_NEVER = "it was never completed"


@dataclass(frozen=True)
class Mandate:
    """Who asks, when, and how far it may go."""

    by: str
    now: datetime
    dry_run: bool
    take_over: bool = False
    """Although a run seems to be at work: it will save no more."""

    @property
    def owner(self) -> str:
        """Of a fence that is taken."""
        return f"{CARETAKER}, {self.by}"


def collected(storage: Storage, policy: Retention, mandate: Mandate) -> Collection:
    """Delete what may go, or say what would. Raises InUseError, SupersededError when another attempt begins meanwhile,
    StorageError."""
    activity = activity_at(storage, mandate.now)
    if not mandate.dry_run and not mandate.take_over:
        demand_quiet(activity, mandate.now)
    at_work = activity is not None and activity.at_work and not mandate.take_over
    place: Storage = OverlayStorage(storage) if mandate.dry_run else storage
    blobs = {stored.name: stored.bytes for stored in place.list(layout.BLOBS)}
    try:
        settled, swept, before = _swept(place, policy, mandate, alone=not at_work)
        is_crowded = False
    except StorageFullError:  # nothing was deleted before the fence, and deleting needs no room
        settled, swept, before = _swept(place, policy, mandate, alone=False)
        is_crowded = True
    gone = [name for name in swept.plan.blobs if place.size(name) is None]
    blob_bytes = sum(blobs.get(name, 0) for name in gone)
    return Collection(
        uri=storage.uri,
        dry_run=mandate.dry_run,
        kept=_kept(swept, before),
        deleted=_deleted(swept, before),
        completed=[str(checkpoint) for checkpoint in settled.completed],
        blobs=len(gone),
        blob_bytes=blob_bytes,
        bytes=swept.num_bytes + blob_bytes,
        unfinished=swept.num_unfinished,
        activity=activity,
        notes=list(_notes(storage, at_work, is_crowded, swept)),
    )


def _notes(storage: Storage, at_work: bool, is_crowded: bool, swept: Swept) -> Iterator[str]:
    if not storage.exclusive:
        yield (
            "the store does not honour conditional writes (If-None-Match): of two attempts that run at once both may"
            " publish, and the later one's counts"
        )
    if is_crowded:
        yield "the storage was full: run this again for what was never finished and for what nothing shares any more"
    if at_work:
        yield "a run seems to be at work: what it has begun and what it shares is left alone"
    if swept.num_unfinished is None:
        yield (
            "what is left of uploads whose writer died cannot be listed with these credentials; give the bucket a"
            " lifecycle rule that aborts incomplete multipart uploads after a day"
        )


def _swept(storage: Storage, policy: Retention, mandate: Mandate, alone: bool) -> tuple[Settled, Swept, _Folders]:
    if alone and _depends_on_fence(storage, policy, mandate):
        fence, settled = begin(storage, mandate.owner, mandate.now)
        before = listed(storage)
        return settled, sweep(storage, policy, fence), before
    before = listed(storage)
    return Settled((), ()), sweep(storage, policy), before


def _depends_on_fence(storage: Storage, policy: Retention, mandate: Mandate) -> bool:
    """Found out by doing it with a fence, where nothing is changed."""
    if any(listing.is_open for listing in listed(storage).values()):
        return True
    imagined = OverlayStorage(storage)
    fence, _ = begin(imagined, mandate.owner, mandate.now)
    return bool(sweep(imagined, policy, fence).plan.blobs)


_Folders = dict[layout.CheckpointId, Listing]


def _kept(swept: Swept, before: _Folders) -> list[Reasoned]:
    gone = set(swept.deleted)
    return [
        Reasoned(id=str(verdict.id), reason="; ".join(verdict.reasons), bytes=_bytes(before, verdict.id))
        for verdict in swept.plan.verdicts
        if verdict.id not in gone
    ]


def _deleted(swept: Swept, before: _Folders) -> list[Reasoned]:
    reasons = {verdict.id: "; ".join(verdict.reasons) for verdict in swept.plan.verdicts}
    return [
        Reasoned(id=str(checkpoint), reason=reasons.get(checkpoint, _NEVER), bytes=_bytes(before, checkpoint))
        for checkpoint in sorted(swept.deleted, reverse=True)
    ]


def _bytes(folders: _Folders, checkpoint: layout.CheckpointId) -> int:
    return sum(folders[checkpoint].sizes.values()) if checkpoint in folders else 0
