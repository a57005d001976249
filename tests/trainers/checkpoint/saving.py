"""Saving and restoring synthetic state the way a job does, for tests of the protocol on any storage."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.commit import begin, publish
from finetune_trainers.checkpoint.fence import Fence
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.manifest import Intent, Manifest, SliceKey, TensorRecord
from finetune_trainers.checkpoint.pins import pin
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.slices import Wanted, even_slice
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import announce, write_rank
from tests.trainers.checkpoint import synthetic
from tests.trainers.checkpoint.faulting import SimulatedDisk
from tests.trainers.checkpoint.synthetic import NOON

SMALL = (
    TensorRecord(name="weight", shape=(70, 40), states={"param": "F32", "exp_avg": "F32"}),
    TensorRecord(name="bias", shape=(3,), states={"param": "F32"}),
)
"""Two tensors: enough for a slice of several chunks (of 4096 bytes) and a small one."""
CHUNK = 4096
SHARD = 2 * CHUNK
"""A rank of two holds a little less than three chunks: it writes two files."""


def start(storage: Storage, now: datetime = NOON) -> Fence:
    fence, _ = begin(storage, "test", now)
    return fence


def intent_of(fence: Fence, step: int, world: int = 2, **changes: Any) -> Intent:
    default = {"tensors": SMALL, "param_groups": (), "token": fence.token}
    return synthetic.intent(step=step, epoch=fence.epoch, world=world, **(default | changes))


def write_all(storage: Storage, intent: Intent, ranks: list[int] | None = None) -> None:
    """Phase one: intent, and files and receipts of the ranks."""
    announce(storage, intent)
    for rank in range(intent.world.size) if ranks is None else ranks:
        write_one(storage, intent, rank)


def write_one(storage: Storage, intent: Intent, rank: int) -> None:
    def data(piece: Slice) -> memoryview:
        return next(synthetic.data(intent, [piece]))

    aux = {"rng.json": b'{"seed":%d}' % rank}
    write_rank(storage, intent, rank, synthetic.slices(intent, rank), data, aux, SHARD, CHUNK)


def save(storage: Storage, fence: Fence, step: int, world: int = 2, **changes: Any) -> Manifest:
    intent = intent_of(fence, step, world, **changes)
    write_all(storage, intent)
    return publish(storage, fence, intent.id)


def saved_run(steps: Iterable[int], pinned: Iterable[int], damaged: Iterable[int]) -> tuple[Storage, Fence]:
    """Checkpoints of these steps, of which some are pinned and some lack a file; what was never saved is left out."""
    storage = PosixStorage("/run", SimulatedDisk())
    fence, steps = start(storage), sorted(steps)
    for step in steps:
        save(storage, fence, step, metrics={"loss": 60.0 - step % 30})
    for step in set(pinned) & set(steps):
        pin(storage, CheckpointId(1, step), "ann", "", NOON)
    for step in set(damaged) & set(steps):
        storage.delete([layout.shard(CheckpointId(1, step), 0)])
    return storage, fence


def restored(storage: Storage, manifest: Manifest, rank: int = 0, world: int = 1) -> dict[SliceKey, bytes]:
    """What a rank of another world size reads."""
    items = {SliceKey(t.role, t.name, s): (t.numel, 4) for t in manifest.intent.tensors for s in t.states}
    wanted = [Wanted(key, *even_slice(numel, rank, world)) for key, (numel, _) in items.items()]
    targets = {want: memoryview(bytearray((want.end - want.start) * items[want.key][1])) for want in wanted}
    SliceReader(storage, manifest).read(targets)
    return {want.key: bytes(target) for want, target in targets.items()}


def original(intent: Intent, rank: int = 0, world: int = 1) -> dict[SliceKey, bytes]:
    """What it must be."""
    found = {}
    for index, tensor in enumerate(intent.tensors):
        start_, end = even_slice(tensor.numel, rank, world)
        for state in tensor.states:
            key = SliceKey(tensor.role, tensor.name, state)
            found[key] = synthetic.whole(intent, index, state)[start_:end].tobytes()
    return found
