"""Synthetic training state: a few odd tensors under AdamW, cut among ranks, and what its checkpoint says.

Every element's value tells which state it is of and where it stands, so that a slice at the wrong place is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainers.checkpoint.manifest import (
    BaseModelPin,
    DataState,
    Intent,
    ParamGroup,
    SliceKey,
    TensorRecord,
    World,
)
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.slices import even_slice

ADAM = {"param": "F32", "exp_avg": "F32", "exp_avg_sq": "F32"}
SHAPES: dict[str, tuple[int, ...]] = {"embed": (37, 8), "norm": (5,), "scale": (), "empty": (0, 4), "proj": (64, 65)}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def intent(**changes: Any) -> Intent:
    """A complete intent; a test states only what matters to it. `world`: a number of ranks."""
    world = changes.pop("world", 2)
    tensors = tuple(TensorRecord(name=name, shape=shape, states=ADAM) for name, shape in SHAPES.items())
    tensors += (TensorRecord(name="buffer", shape=(9,), states={"value": "BF16"}),)
    default = {
        "step": 10,
        "epoch": 1,
        "token": "t-1",
        "job": "run",
        "created": NOON,
        "world": World(size=world, zero_stage=3),
        "tensors": tensors,
        "param_groups": (ParamGroup(name="decay", tensors=tuple(SHAPES), options={"lr": 1e-3, "betas": [0.9, 0.99]}),),
        "base_model": BaseModelPin(source="hf://org/base", digest="0" * 64),
        "data": DataState(seed=7, epoch=0, cursor=80, digest="1" * 64),
    }
    return Intent(**(default | changes))


def slices(of: Intent, rank: int) -> list[Slice]:
    """What a rank holds under ZeRO-3, state by state, larger elements first."""
    held = []
    for state in ("param", "exp_avg", "exp_avg_sq", "value"):
        for index, tensor in enumerate(of.tensors):
            if state in tensor.states:
                start, end = even_slice(tensor.numel, rank, of.world.size)
                if start < end:
                    held.append(Slice(index, state, start, end))
    return held


def whole(of: Intent, tensor: int, state: str) -> NDArray[Any]:
    """All elements of a state. They depend on step and attempt: a stale shard differs everywhere."""
    record = of.tensors[tensor]
    base = hash_of(record.role, record.name, state, of.step, of.epoch)
    values = np.arange(record.numel, dtype=np.uint32) * 2654435761 + base
    return values.astype(np.uint32) if record.states[state] == "F32" else values.astype(np.uint16)


def hash_of(*parts: object) -> np.uint32:
    """A number that is the same in every process."""
    number = 2166136261
    for byte in repr(parts).encode():
        number = (number ^ byte) * 16777619 % 2**32
    return np.uint32(number)


def data(of: Intent, held: list[Slice]) -> Iterator[memoryview]:
    """The bytes of each slice."""
    for piece in held:
        yield whole(of, piece.tensor, piece.state)[piece.start : piece.end].data.cast("B")


def keys(of: Intent) -> list[SliceKey]:
    return [SliceKey(tensor.role, tensor.name, state) for tensor in of.tensors for state in tensor.states]
