"""`finetune ckpt ls` and `inspect`: what is there, in what state, and what a checkpoint says of itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime

from pydantic import JsonValue

from finetune_api.checkpoints import (
    CheckpointDetails,
    CheckpointList,
    CheckpointState,
    CheckpointSummary,
    GroupSummary,
    PinSummary,
    StateSummary,
    StoredFile,
    TensorSummary,
)
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.activity import activity_at
from finetune_trainers.checkpoint.admin.choosing import manifest_of
from finetune_trainers.checkpoint.documents import BadDocumentError, parse
from finetune_trainers.checkpoint.find import read_manifest, verified
from finetune_trainers.checkpoint.identity import trainings
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Abandoned, Intent, Manifest, ParamGroup
from finetune_trainers.checkpoint.pins import Pin, read_pins
from finetune_trainers.checkpoint.retention import Candidate, Retention, Verdict, choose
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import Tombstone

__all__ = ["details", "listing_of", "pin_summary"]

_AT_ONCE = 4
_UNREADABLE = (BadDocumentError, StorageMissingError, StorageTornError)


@dataclass(frozen=True)
class _Judged:
    """A folder, and what it turned out to be."""

    listing: Listing
    state: CheckpointState
    intent: Intent | None
    problems: list[str] = field(default_factory=list)

    @property
    def is_checkpoint(self) -> bool:
        return self.state in (CheckpointState.WHOLE, CheckpointState.DAMAGED)


def listing_of(storage: Storage, policy: Retention, now: datetime) -> CheckpointList:
    """Everything at a place, quickly verified."""
    folders, pins = listed(storage), read_pins(storage)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        judged = list(pool.map(lambda listing: _judged(storage, listing), folders.values()))
    newest = next((one.listing.checkpoint for one in judged if one.state is CheckpointState.WHOLE), None)
    verdicts = {verdict.id: verdict for verdict in _verdicts(judged, pins, policy)}
    shared = sum(stored.bytes for stored in storage.list(layout.BLOBS))
    rows = [_summary(one, pins, verdicts.get(one.listing.checkpoint)) for one in judged]
    return CheckpointList(
        uri=storage.uri,
        checkpoints=rows,
        newest=None if newest is None else str(newest),
        bytes=sum(row.bytes for row in rows) + shared,
        shared_bytes=shared,
        activity=activity_at(storage, now),
    )


def _judged(storage: Storage, listing: Listing) -> _Judged:
    checkpoint = listing.checkpoint
    if listing.is_deleting:
        reason = _reason_of_tombstone(storage, checkpoint)
        return _Judged(listing, CheckpointState.DELETING, None, [reason] if reason else [])
    if listing.is_open:
        intent = _intent(storage, checkpoint)
        of = f" of {intent.world.size}" if intent is not None else ""
        return _Judged(listing, CheckpointState.UNFINISHED, intent, [f"{len(listing.ranks)}{of} receipts are there"])
    found = verified(storage, listing)
    if isinstance(found, Manifest):
        return _Judged(listing, CheckpointState.WHOLE, found.intent)
    if isinstance(found, Abandoned):
        return _Judged(listing, CheckpointState.ABANDONED, _intent(storage, checkpoint), [found.reason])
    manifest = read_manifest(storage, checkpoint)
    intent = manifest.intent if isinstance(manifest, Manifest) else _intent(storage, checkpoint)
    return _Judged(listing, CheckpointState.DAMAGED, intent, [str(damage) for damage in found.damages])


def _intent(storage: Storage, checkpoint: CheckpointId) -> Intent | None:
    try:
        return parse(storage.read(layout.intent(checkpoint)), Intent)
    except _UNREADABLE:
        return None


def _reason_of_tombstone(storage: Storage, checkpoint: CheckpointId) -> str:
    try:
        return parse(storage.read(layout.tombstone(checkpoint)), Tombstone).reason
    except _UNREADABLE:
        return ""


def _verdicts(judged: Sequence[_Judged], pins: Mapping[CheckpointId, Pin | None], policy: Retention) -> list[Verdict]:
    found = [one for one in judged if one.is_checkpoint]
    candidates, whole = [], dict[int, CheckpointId]()
    for one, training in zip(found, trainings(one.intent for one in found), strict=True):
        checkpoint = one.listing.checkpoint
        metrics = one.intent.metrics if one.intent is not None else {}
        size = sum(one.listing.sizes.values())
        candidates.append(Candidate(checkpoint, size, metrics, checkpoint in pins, training))
        if one.state is CheckpointState.WHOLE:
            whole.setdefault(training, checkpoint)
    return choose(candidates, policy, whole.values())


def _summary(one: _Judged, pins: Mapping[CheckpointId, Pin | None], verdict: Verdict | None) -> CheckpointSummary:
    checkpoint, intent = one.listing.checkpoint, one.intent
    return CheckpointSummary(
        id=str(checkpoint),
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        state=one.state,
        problems=one.problems,
        created=intent.created if intent else None,
        bytes=sum(one.listing.sizes.values()),
        world_size=intent.world.size if intent else None,
        zero_stage=intent.world.zero_stage if intent else None,
        metrics=intent.metrics if intent else {},
        pin=pin_summary(pins[checkpoint]) if checkpoint in pins else None,
        keep=verdict.keep if verdict else None,
        reasons=list(verdict.reasons) if verdict else [],
    )


def pin_summary(pin: Pin | None) -> PinSummary:
    return PinSummary() if pin is None else PinSummary(by=pin.by, reason=pin.reason, created=pin.created)


def details(storage: Storage, checkpoint: CheckpointId, with_tensors: bool) -> CheckpointDetails:
    """Raises UnknownCheckpointError when it is no checkpoint, or its manifest cannot be read."""
    manifest = manifest_of(storage, checkpoint)
    intent, listing = manifest.intent, listed(storage, checkpoint)[checkpoint]
    parent = intent.parent
    return CheckpointDetails(
        uri=storage.uri,
        summary=_summary(_judged(storage, listing), read_pins(storage), None),
        job=intent.job,
        attempt=intent.attempt,
        base_model=None if intent.base_model is None else intent.base_model.to_document(),
        adapter=intent.adapter,
        writer=intent.writer,
        consumed_samples=intent.consumed_samples,
        global_batch=intent.global_batch,
        data=None if intent.data is None else intent.data.to_document(),
        parent=None if parent is None else str(CheckpointId(parent.epoch, parent.step)),
        lossy=intent.lossy,
        groups=[_group(group) for group in intent.param_groups],
        states=_states(intent),
        files=_files(manifest, listing),
        num_tensors=len(intent.tensors),
        num_parameters=sum(tensor.numel for tensor in intent.tensors),
        tensors=list(_tensors(intent)) if with_tensors else None,
    )


def _group(group: ParamGroup) -> GroupSummary:
    count = len(group.tensors)
    each: dict[str, JsonValue] = {
        name: value
        for name, value in group.options.items()
        if not (isinstance(value, list) and name == "steps") and value is not None
    }
    return GroupSummary(role=group.role, name=group.name, num_tensors=count, options=each)


def _states(intent: Intent) -> list[StateSummary]:
    counts: defaultdict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for tensor in intent.tensors:
        for state, dtype in tensor.states.items():
            found = counts[tensor.role, state, dtype]
            found[0] += 1
            found[1] += tensor.numel
    return [
        StateSummary(
            role=role,
            state=state,
            dtype=dtype,
            num_tensors=tensors,
            num_elements=elements,
            bytes=elements * ITEM_BYTES.get(dtype, 0),
        )
        for (role, state, dtype), (tensors, elements) in sorted(counts.items(), key=lambda item: _order(*item[0]))
    ]


def _order(role: str, state: str, dtype: str) -> tuple[str, bool, str, str]:
    """Parameters before what belongs to them."""
    return role, state != "param", state, dtype


def _files(manifest: Manifest, listing: Listing) -> list[StoredFile]:
    prefix = layout.folder(manifest.id)
    ranks = {file: receipt.rank for receipt in manifest.receipts for file, _ in receipt.files()}
    names = ((name.removeprefix(prefix), size) for name, size in sorted(listing.sizes.items()))
    own = [StoredFile(name=name, bytes=size, rank=ranks.get(name)) for name, size in names]
    return own + [StoredFile(name=f"shared: {blob.name}", bytes=blob.bytes) for blob in manifest.intent.blobs]


def _tensors(intent: Intent) -> Iterator[TensorSummary]:
    for tensor in intent.tensors:
        yield TensorSummary(role=tensor.role, name=tensor.name, shape=list(tensor.shape), states=tensor.states)
