"""Whether an intent and the receipts of its ranks make a checkpoint. Pure; asked at commit and again at load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Intent, Manifest, Receipt, ShardRecord, SliceKey
from finetune_trainers.checkpoint.slices import tiling_faults

__all__ = ["assembly_faults"]


def assembly_faults(intent: Intent, receipts: Sequence[Receipt]) -> list[str]:
    """A sentence for each reason why intent and receipts do not make a checkpoint; none when they do."""
    faults = [f"rank {rank} has no receipt" for rank in _missing_ranks(intent, receipts)]
    for receipt in receipts:
        faults += [f"receipt of rank {receipt.rank}: {fault}" for fault in _receipt_faults(intent, receipt)]
    return faults or _state_faults(intent, receipts)


def _missing_ranks(intent: Intent, receipts: Sequence[Receipt]) -> list[int]:
    there = {receipt.rank for receipt in receipts}
    return [rank for rank in range(intent.world.size) if rank not in there]


def _receipt_faults(intent: Intent, receipt: Receipt) -> Iterator[str]:
    if (receipt.step, receipt.epoch, receipt.token) != (intent.step, intent.epoch, intent.token):
        yield f"is of step {receipt.step} of attempt {receipt.epoch}, or of another attempt of that number"
    if receipt.rank >= intent.world.size:
        yield f"there are only {intent.world.size} ranks"
    mine = {layout.shard(intent.id, receipt.rank, part) for part in range(len(receipt.shards))}
    mine |= {layout.aux(intent.id, receipt.rank, aux.name, kind) for aux in receipt.aux for kind in layout.AUX_SUFFIXES}
    for file, _ in receipt.files():
        if layout.folder(intent.id) + file not in mine:
            yield f"{file} is not a file of this rank"
    for shard in receipt.shards:
        yield from _shard_faults(intent, shard)


def _shard_faults(intent: Intent, shard: ShardRecord) -> Iterator[str]:
    upto = None
    for extent in shard.extents:
        if not 0 <= extent.tensor < len(intent.tensors):
            yield f"{shard.file} has a slice of tensor {extent.tensor}, which is not in the intent"
            return
        tensor = intent.tensors[extent.tensor]
        dtype = tensor.states.get(extent.state)
        if dtype not in ITEM_BYTES:
            yield f"{shard.file} has {extent.state!r} of {tensor.name}, for which the intent has no type"
            return
        if upto is not None and extent.offset != upto:
            yield f"{shard.file} does not hold its slices end to end at byte {extent.offset}"
        upto = extent.offset + extent.size(ITEM_BYTES[dtype])
    if upto is not None and not upto <= shard.table_offset <= shard.bytes:
        yield f"{shard.file}: its slices end at byte {upto}, after its digests begin"


def _state_faults(intent: Intent, receipts: Sequence[Receipt]) -> list[str]:
    numels = {
        SliceKey(tensor.role, tensor.name, state): tensor.numel for tensor in intent.tensors for state in tensor.states
    }
    if len(numels) != sum(len(tensor.states) for tensor in intent.tensors):
        return ["two tensors have the same role and name"]
    manifest = Manifest(intent=intent, receipts=tuple(receipts))
    extents = (
        (manifest.key(extent), extent.start, extent.end)
        for receipt in receipts
        for shard in receipt.shards
        for extent in shard.extents
    )
    return tiling_faults(numels, extents)
