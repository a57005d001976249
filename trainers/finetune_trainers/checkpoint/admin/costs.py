"""`finetune ckpt plan`: what each process would read to go on from a checkpoint, at any world size and ZeRO stage.

Nothing but the manifest is read. What a process holds follows from the stage, as `engine_state` finds it in engines:
everything (0), a part of each flat group (1 and 2; DeepSpeed aligns its parts to two elements, which moves borders by
an element or so), or an even slice of every tensor (3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from finetune_api.checkpoints import RankReads, RestoreCosts
from finetune_trainers.checkpoint.manifest import Intent, Manifest, SliceKey, TensorRecord
from finetune_trainers.checkpoint.reading import RestorePlan, SliceReader
from finetune_trainers.checkpoint.slices import Wanted, even_slice, flat_group_slices
from finetune_trainers.checkpoint.storage.protocol import Requests, Storage

__all__ = ["costs_of"]

_ALIGNMENT = 2


def costs_of(
    storage: Storage, manifest: Manifest, world: int, zero_stage: int | None, memory: int | None
) -> RestoreCosts:
    """`zero_stage` None: as it was saved. `memory`: bytes that a process has for this; None: nobody said."""
    saved = manifest.intent.world
    stage = saved.zero_stage if zero_stage is None else zero_stage
    reader = SliceReader(storage, manifest)
    plans = (reader.plan(_held(manifest.intent, rank, world, stage)) for rank in range(world))
    ranks = [_reads(rank, plan, storage.requests) for rank, plan in enumerate(plans)]
    needed, read = sum(rank.bytes_needed for rank in ranks), sum(rank.bytes_read for rank in ranks)
    largest = max(rank.memory_bytes for rank in ranks)
    return RestoreCosts(
        id=str(manifest.id),
        saved_world=saved.size,
        saved_zero_stage=saved.zero_stage,
        world=world,
        zero_stage=stage,
        ranks=ranks,
        bytes_needed=needed,
        bytes_read=read,
        amplification=read / needed if needed else 1.0,
        memory_bytes=largest,
        fits=None if memory is None else largest <= memory,
        notes=list(_notes(manifest.intent, world, stage)),
    )


def _reads(rank: int, plan: RestorePlan, requests: Requests) -> RankReads:
    reads = plan.reads.reads
    in_flight = sorted((read.end - read.start for read in reads), reverse=True)[: requests.at_once]
    return RankReads(
        rank=rank,
        bytes_needed=plan.reads.bytes_needed,
        bytes_read=plan.bytes_read,
        requests=plan.num_requests,
        files=len({read.file for read in reads}),
        memory_bytes=plan.reads.bytes_needed + (sum(in_flight) if requests.buffered else 0),
    )


def _held(intent: Intent, rank: int, world: int, stage: int) -> Iterator[Wanted[SliceKey]]:
    """What a rank of that engine holds of every state."""
    if stage in (1, 2):
        for group in _groups(intent):
            numels = [tensor.numel for tensor in group]
            for index, start, end in flat_group_slices(numels, rank, world, _ALIGNMENT):
                yield from _of(group[index], start, end)
        return
    for tensor in intent.tensors:
        yield from _of(tensor, *(even_slice(tensor.numel, rank, world) if stage == 3 else (0, tensor.numel)))


def _of(tensor: TensorRecord, start: int, end: int) -> Iterator[Wanted[SliceKey]]:
    for state in tensor.states:
        yield Wanted(SliceKey(tensor.role, tensor.name, state), start, end)


def _groups(intent: Intent) -> list[list[TensorRecord]]:
    """The optimizer's groups; what is in none makes one for each role."""
    by_name = {(tensor.role, tensor.name): tensor for tensor in intent.tensors}
    groups = [
        [by_name.pop((group.role, name)) for name in group.tensors if (group.role, name) in by_name]
        for group in intent.param_groups
    ]
    rest: defaultdict[str, list[TensorRecord]] = defaultdict(list)
    for (role, _), tensor in by_name.items():
        rest[role].append(tensor)
    return [*groups, *rest.values()]


def _notes(intent: Intent, world: int, stage: int) -> Iterator[str]:
    if intent.global_batch % world:
        yield (
            f"the global batch of {intent.global_batch} sequences cannot be shared by {world} processes:"
            " a run goes on only where it can, since batches must stay what they were"
        )
    if stage in (1, 2):
        yield "under ZeRO 1 and 2 the borders between processes may differ from these by DeepSpeed's padding"
    if stage == 0 and world > 1:
        yield "under ZeRO 0 every process reads everything"
