"""Training state of a chosen size, synthetic, and what the benchmarks of checkpoints do to it and to the disk below it.

    tensors       the parameters of about so many bytes of AdamW state
    save          all ranks' parts, one after the other, and the manifest
    raw_write     the same number of bytes, written and flushed with nothing else done
    flush         what was written without it
    raw_read      files read from end to end with nothing else done
    cold          takes files out of the page cache, so that reading them asks the disk

The disk of a shared machine drifts: whatever is divided by a raw figure is divided by one of the same minute.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_trainers.checkpoint.commit import publish
from finetune_trainers.checkpoint.fence import Fence
from finetune_trainers.checkpoint.manifest import Intent, Manifest, SliceKey, TensorRecord, World
from finetune_trainers.checkpoint.reading import SliceReader, Targets
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.slices import Wanted, even_slice
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import announce, write_rank

__all__ = [
    "STATES",
    "WIDTH",
    "cold",
    "flush",
    "raw_read",
    "raw_write",
    "restore",
    "save",
    "targets",
    "tensors",
    "timed",
]

WIDTH = 1024
"""Every parameter is a square of this width, in fp32."""
STATES = ("param", "exp_avg", "exp_avg_sq")
_BLOCK_BYTES = 8 << 20


def tensors(total_bytes: int) -> tuple[TensorRecord, ...]:
    """Parameters whose masters and moments are about `total_bytes`."""
    count = max(1, round(total_bytes / (4 * len(STATES) * WIDTH * WIDTH)))
    states = dict.fromkeys(STATES, "F32")
    return tuple(TensorRecord(name=f"layers.{n}.weight", shape=(WIDTH, WIDTH), states=states) for n in range(count))


def save(storage: Storage, fence: Fence, step: int, world: int, of: tuple[TensorRecord, ...]) -> Manifest:
    """A checkpoint of a world of so many ranks, each with an even slice of each parameter."""
    intent = Intent(
        step=step,
        epoch=fence.epoch,
        token=fence.token,
        job="bench",
        created=datetime.now(UTC),
        world=World(size=world, zero_stage=3),
        tensors=of,
        param_groups=(),
    )
    values = _values()
    announce(storage, intent)
    for rank in range(world):
        held = [
            Slice(index, state, *even_slice(tensor.numel, rank, world))
            for state in STATES
            for index, tensor in enumerate(of)
        ]
        write_rank(storage, intent, rank, held, lambda piece: values[piece.start : piece.end].data.cast("B"), {})
    return publish(storage, fence, intent.id)


def targets(manifest: Manifest, rank: int, world: int) -> Targets:
    """What a rank of such a world asks for, and memory for it that has been touched."""
    wanted = [
        Wanted(SliceKey(tensor.role, tensor.name, state), *even_slice(tensor.numel, rank, world))
        for tensor in manifest.intent.tensors
        for state in tensor.states
    ]
    return {want: np.ones((want.end - want.start) * 4, np.uint8).data for want in wanted}


def restore(storage: Storage, manifest: Manifest, into: Iterable[Targets]) -> tuple[int, int]:
    """All ranks' parts, one after the other -> (bytes read, bytes needed)."""
    read = needed = 0
    for memory in into:
        restored = SliceReader(storage, manifest).read(memory)
        read += restored.bytes_read
        needed += restored.reads.bytes_needed
    return read, needed


def raw_write(folder: Path, total_bytes: int) -> None:
    """One file, flushed to the disk, and written over by the next call."""
    block = _values().data.cast("B")
    with (folder / "raw").open("wb", buffering=0) as file:
        for start in range(0, total_bytes, len(block)):
            file.write(block[: min(len(block), total_bytes - start)])
        os.fsync(file.fileno())


def raw_read(files: Iterable[Path]) -> int:
    """Bytes read."""
    memory, total = memoryview(bytearray(_BLOCK_BYTES)), 0
    for name in files:
        with name.open("rb", buffering=0) as file:
            while size := file.readinto(memory):
                total += size
    return total


def cold(folder: Path) -> list[Path]:
    """The folder's files, none of which is in memory any more."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for name in files:
        with name.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


def flush(folder: Path) -> None:
    """Every file below the folder, to the disk: what peers leave to the kernel."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def timed(act: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


@cache
def _values() -> NDArray[np.float32]:
    """Random, so that no disk can make less of it. Made once, and not in every write that is timed."""
    return np.random.default_rng(0).standard_normal(WIDTH * WIDTH, dtype=np.float32)
