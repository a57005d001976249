"""`finetune ckpt verify`: quick looks at sizes, receipts and documents; deep reads every byte."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from finetune_api.answers import Step
from finetune_api.checkpoints import Damages, FileDamage, Verification
from finetune_trainers.answering import OnStep
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.choosing import was_deleted
from finetune_trainers.checkpoint.find import Rejected, read_manifest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.manifest import Abandoned, Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.verify import Damage, deep_damages, quick_damages

__all__ = ["damages_of", "verification"]

"""Called from time to time while something takes time, from any thread."""


class _Counted:
    """A storage that tells how much was read of large files. What is not counted is passed on."""

    def __init__(self, inner: Storage, on_bytes: Callable[[int], None]) -> None:
        self._inner, self._on_bytes = inner, on_bytes

    def read_range(self, name: str, start: int, end: int) -> bytes | memoryview:
        data = self._inner.read_range(name, start, end)
        self._on_bytes(end - start)
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


class _Meter:
    """Adds up what several threads read."""

    def __init__(self, total: int, on_step: OnStep) -> None:
        self.what, self.done, self._total, self._on_step = "", 0, total, on_step
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.done += num_bytes
            self._on_step(Step(what=self.what, done=min(self.done, self._total), total=self._total))


def verification(storage: Storage, asked: Sequence[CheckpointId], deep: bool, on_step: OnStep) -> Verification:
    """Verify published checkpoints. Memory is that of a few blocks, however large they are. What was given up is left
    out: it never was a checkpoint. What a run deletes meanwhile is told, and is no damage."""
    folders = listed(storage)
    meter = _Meter(sum(_volume(storage, one) for one in asked) if deep else 0, on_step)
    counted: Storage = _Counted(storage, meter.add)  # type: ignore[assignment]
    found, deleted = [], []
    for checkpoint in asked:
        meter.what = str(checkpoint)
        damages = _damages(counted, folders.get(checkpoint, Listing(checkpoint, {})), deep)
        if damages and was_deleted(storage, checkpoint):
            deleted.append(str(checkpoint))
        elif damages is not None:
            found.append(damages_of(checkpoint, damages))
    whole = all(one.whole for one in found)
    return Verification(
        uri=storage.uri, deep=deep, whole=whole, checkpoints=found, deleted=deleted, bytes_read=meter.done
    )


def _damages(storage: Storage, listing: Listing, deep: bool) -> Sequence[Damage] | None:
    """All that is wrong; None for what was given up."""
    manifest = read_manifest(storage, listing.checkpoint)
    if isinstance(manifest, Abandoned):
        return None
    if isinstance(manifest, Rejected):
        return manifest.damages
    damages = quick_damages(storage, manifest, listing.sizes)
    named = {damage.file for damage in damages}
    if deep and layout.manifest(listing.checkpoint) not in named:  # else it does not say where anything is
        damages += [damage for damage in deep_damages(storage, manifest) if damage.file not in named]
    return damages


def damages_of(checkpoint: CheckpointId, damages: Sequence[Damage]) -> Damages:
    return Damages(id=str(checkpoint), whole=not damages, damages=[_as_report(damage) for damage in damages])


def _as_report(damage: Damage) -> FileDamage:
    if damage.key is None:
        return FileDamage(file=damage.file, what=damage.what)
    role, tensor, state = damage.key
    return FileDamage(
        file=damage.file, what=damage.what, role=role, tensor=tensor, state=state, start=damage.start, end=damage.end
    )


def _volume(storage: Storage, checkpoint: CheckpointId) -> int:
    """Bytes that a deep look reads, for the progress."""
    found = read_manifest(storage, checkpoint)
    if not isinstance(found, Manifest):
        return 0
    return found.bytes + sum(blob.bytes for blob in found.intent.blobs)
