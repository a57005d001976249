"""One rank's part of a checkpoint: shards, auxiliary files, and last the receipt. Called by the rank's writer.

No rank waits for another one. Memory is that of the slices, which the caller holds, and of a few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from blake3 import blake3

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import sealed
from finetune_trainers.checkpoint.manifest import AuxRecord, BlobRecord, Intent, Receipt, ShardRecord
from finetune_trainers.checkpoint.shards import (
    CHUNK_BYTES,
    SHARD_BYTES,
    ShardPlan,
    Slice,
    chunk_digests,
    digest_of_digests,
    shared_out,
    whole_chunks,
)
from finetune_trainers.checkpoint.storage.errors import StorageConflictError
from finetune_trainers.checkpoint.storage.protocol import Parts, Storage

__all__ = ["SliceData", "announce", "write_blob", "write_rank"]

SliceData = Callable[[Slice], memoryview]
"""The bytes of a slice; asked again when an upload starts again."""

Item = TypeVar("Item")

_BLOCK_BYTES = 8 << 20
_FILES_AT_ONCE = 4


def announce(storage: Storage, intent: Intent) -> None:
    """The coordinator's first act. StorageConflictError when this attempt has begun to save this step before: to try
    the same step again, take a new fence."""
    storage.create(layout.intent(intent.id), sealed(intent))


def write_rank(
    storage: Storage,
    intent: Intent,
    rank: int,
    slices: Sequence[Slice],
    data: SliceData,
    aux: Mapping[str, bytes],
    shard_bytes: int = SHARD_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> Receipt:
    """Write what a rank holds, a few files at a time. `aux`: name with suffix (`rng.json`) -> content.

    Durable when it returns.
    """
    parts = enumerate(shared_out(intent, slices, shard_bytes, chunk_bytes) if slices else [])
    receipt = Receipt(
        step=intent.step,
        epoch=intent.epoch,
        token=intent.token,
        rank=rank,
        shards=_all_at_once(lambda part: _write_shard(storage, intent, rank, *part, data, chunk_bytes), parts),
        aux=tuple(_write_aux(storage, intent, rank, name, content) for name, content in aux.items()),
    )
    storage.create(layout.receipt(intent.id, rank), sealed(receipt))
    return receipt


def write_blob(storage: Storage, name: str, parts: Parts, size: int, digest: str) -> BlobRecord:
    """A file that checkpoints share, unless it is there. The intent that names it must have been announced: it keeps
    the blob from being swept meanwhile."""
    place = layout.blob(digest)
    found = storage.size(place)
    if found is not None and found != size:
        storage.delete([place])  # its name says what it holds, so this one is damaged
    if found != size:
        with suppress(StorageConflictError):  # another rank has written the same meanwhile
            storage.write(place, parts, size)
    return BlobRecord(name=name, digest=digest, bytes=size)


def _write_aux(storage: Storage, intent: Intent, rank: int, name: str, content: bytes) -> AuxRecord:
    stem, _, suffix = name.rpartition(".")
    place = layout.aux(intent.id, rank, stem, suffix)
    storage.create(place, content)
    return AuxRecord(name=stem, file=_last(place), bytes=len(content), digest=blake3(content).hexdigest())


def _all_at_once(write: Callable[[Item], ShardRecord], items: Iterable[Item]) -> tuple[ShardRecord, ...]:
    """A few at a time; after a failure no other is begun."""
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="shard") as pool:
        futures = [pool.submit(write, item) for item in items]
        try:
            return tuple(future.result() for future in futures)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_shard(
    storage: Storage,
    intent: Intent,
    rank: int,
    part: int,
    slices: Sequence[Slice],
    data: SliceData,
    chunk_bytes: int,
) -> ShardRecord:
    plan, place = ShardPlan.of(intent, rank, slices, chunk_bytes), layout.shard(intent.id, rank, part)
    digests: list[str] = []
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as hashing:
        storage.write(place, lambda: _stream(plan, data, hashing, digests), plan.bytes)
    return plan.record(_last(place), digests)


def _stream(plan: ShardPlan, data: SliceData, hashing: ThreadPoolExecutor, digests: list[str]) -> Iterator[memoryview]:
    """The file's content. Each block is hashed by another thread while the storage writes it; `digests` gets the
    digest of each slice."""
    digests.clear()
    tables, each = [], whole_chunks(_BLOCK_BYTES, plan.chunk_bytes)
    yield memoryview(plan.header)
    for piece, offset, end in zip(plan.slices, plan.offsets, (*plan.offsets[1:], plan.table_offset), strict=True):
        content = data(piece)
        assert content.nbytes == end - offset, f"{piece} is {end - offset} bytes long, not {content.nbytes}"
        pending: list[Future[bytes]] = []
        for begin in range(0, len(content), each):
            block = content[begin : begin + each]
            pending.append(hashing.submit(chunk_digests, block, plan.chunk_bytes))
            yield block
        tables.append(b"".join(future.result() for future in pending))
        digests.append(digest_of_digests(tables[-1]))
    yield memoryview(b"".join(tables))


def _last(name: str) -> str:
    return name.rpartition("/")[2]
