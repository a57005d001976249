"""Whether a checkpoint's files are what its manifest says. Quick: all there, of the right size, with their receipts.
Deep: every byte.

Both return what is wrong, file by file, and raise only when the storage itself cannot be asked: a store that is away
for a minute must not make a good checkpoint look bad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

from blake3 import blake3

from finetune_api.base import Contract
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.assembly import assembly_faults
from finetune_trainers.checkpoint.documents import BadDocumentError, parse, sealed
from finetune_trainers.checkpoint.manifest import Extent, Manifest, ShardRecord, SliceKey
from finetune_trainers.checkpoint.shards import (
    DIGEST_BYTES,
    ShardPlan,
    Slice,
    chunk_digests,
    digest_of_digests,
    num_chunks,
    whole_chunks,
)
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["Damage", "deep_damages", "differing_rows", "quick_damages", "rows_damage"]

_THREADS = 4
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: in which file, at which elements of which tensor when it is about some, and what."""

    file: str
    what: str
    key: SliceKey | None = None
    start: int = 0
    end: int = 0

    def __str__(self) -> str:
        about = f" {' '.join(self.key)} [{self.start}, {self.end})" if self.key else ""
        return f"{self.file}{about}: {self.what}"


def quick_damages(storage: Storage, manifest: Manifest, sizes: Mapping[str, int]) -> list[Damage]:
    """`sizes` is a listing of at least the checkpoint's folder: name -> bytes. Reads intent and receipts, not data."""
    here, folder = layout.manifest(manifest.id), layout.folder(manifest.id)
    damages = [Damage(here, fault) for fault in assembly_faults(manifest.intent, manifest.receipts)]
    files = ((folder + file, size) for receipt in manifest.receipts for file, size in receipt.files())
    damages += _wrong_sizes(files, sizes.get)
    damages += _wrong_sizes(((layout.blob(blob.digest), blob.bytes) for blob in manifest.intent.blobs), storage.size)
    documents: list[tuple[str, Contract]] = [(layout.intent(manifest.id), manifest.intent)]
    documents += [(layout.receipt(manifest.id, receipt.rank), receipt) for receipt in manifest.receipts]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda document: _document_damages(storage, *document), documents)
        return [*damages, *chain.from_iterable(found)]


def deep_damages(storage: Storage, manifest: Manifest) -> list[Damage]:
    """Reads every byte of every file once; memory stays at a few blocks. Beside `quick_damages`, not in its place."""
    folder = layout.folder(manifest.id)
    checks: list[Callable[[], list[Damage]]] = []
    for receipt in manifest.receipts:
        checks += [partial(_shard_damages, storage, manifest, receipt.rank, shard) for shard in receipt.shards]
        checks += [partial(_file_damages, storage, folder + aux.file, aux.bytes, aux.digest) for aux in receipt.aux]
    checks += [
        partial(_file_damages, storage, layout.blob(blob.digest), blob.bytes, blob.digest)
        for blob in manifest.intent.blobs
    ]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(chain.from_iterable(pool.map(lambda check: check(), checks)))


def differing_rows(found: bytes, expected: bytes | memoryview) -> list[int]:
    """The numbers of the chunks whose digests differ."""
    size = DIGEST_BYTES
    return [row for row in range(len(found) // size) if found[row * size :][:size] != expected[row * size :][:size]]


def rows_damage(file: str, key: SliceKey, extent: Extent, item: int, chunk: int, rows: list[int]) -> Damage:
    """What is wrong with some chunks of a slice, as one range of elements."""
    each = chunk // item
    start, end = extent.start + rows[0] * each, min(extent.start + (rows[-1] + 1) * each, extent.end)
    return Damage(file, "the bytes are not those that were saved", key, start, end)


def _wrong_sizes(files: Iterable[tuple[str, int]], size_of: Callable[[str], int | None]) -> Iterator[Damage]:
    for file, size in files:
        found = size_of(file)
        if found is None:
            yield Damage(file, "is missing")
        elif found != size:
            yield Damage(file, f"has {found} bytes where {size} were saved")


def _document_damages(storage: Storage, file: str, expected: Contract) -> list[Damage]:
    try:
        data = storage.read(file)
    except StorageMissingError:
        return [Damage(file, "is missing")]
    except StorageTornError as error:
        return [Damage(file, error.message)]
    if data == sealed(expected):
        return []
    try:
        parse(data, type(expected))
    except BadDocumentError as error:
        return [Damage(file, str(error))]
    return [Damage(file, "is not the one that the manifest was made of")]


def _file_damages(storage: Storage, file: str, size: int, digest: str) -> list[Damage]:
    try:
        found = blake3()
        for begin in range(0, size, _BLOCK_BYTES):
            found.update(storage.read_range(file, begin, min(begin + _BLOCK_BYTES, size)))
    except (StorageMissingError, StorageTornError) as error:
        return [Damage(file, error.message)]
    return [] if found.hexdigest() == digest else [Damage(file, "the bytes are not those that were saved")]


def _shard_damages(storage: Storage, manifest: Manifest, rank: int, shard: ShardRecord) -> list[Damage]:
    file = layout.folder(manifest.id) + shard.file
    try:
        return [*_header_damages(storage, manifest, rank, shard), *_slice_damages(storage, manifest, shard, file)]
    except (StorageMissingError, StorageTornError) as error:
        return [Damage(file, error.message)]


def _header_damages(storage: Storage, manifest: Manifest, rank: int, shard: ShardRecord) -> Iterator[Damage]:
    file = layout.folder(manifest.id) + shard.file
    slices = [Slice(extent.tensor, extent.state, extent.start, extent.end) for extent in shard.extents]
    plan = ShardPlan.of(manifest.intent, rank, slices, shard.chunk_bytes)
    if plan.record(shard.file, [extent.digest for extent in shard.extents]) != shard:
        yield Damage(file, "is not laid out as its slices demand")
    elif bytes(storage.read_range(file, 0, len(plan.header))) != plan.header:
        yield Damage(file, "its header is not the one that was saved")


def _slice_damages(storage: Storage, manifest: Manifest, shard: ShardRecord, file: str) -> Iterator[Damage]:
    table = storage.read_range(file, shard.table_offset, shard.bytes)
    row = 0
    for extent in shard.extents:
        item = manifest.item(extent)
        count = num_chunks(extent.size(item), shard.chunk_bytes)
        stored = bytes(table[row * DIGEST_BYTES : (row + count) * DIGEST_BYTES])
        row += count
        found = _digests(storage, file, extent, extent.size(item), shard.chunk_bytes)
        if found == stored and digest_of_digests(found) == extent.digest:
            continue
        key = manifest.key(extent)
        if digest_of_digests(found) == extent.digest:
            yield Damage(file, "the digests beside these elements are not those that were saved", key, *extent[2:4])
        else:
            trusted = digest_of_digests(stored) == extent.digest
            rows = differing_rows(found, stored) if trusted else list(range(count))
            yield rows_damage(file, key, extent, item, shard.chunk_bytes, rows)


def _digests(storage: Storage, file: str, extent: Extent, size: int, chunk: int) -> bytes:
    block = whole_chunks(_BLOCK_BYTES, chunk)
    parts = []
    for begin in range(0, size, block):
        data = storage.read_range(file, extent.offset + begin, extent.offset + min(begin + block, size))
        parts.append(chunk_digests(memoryview(data), chunk))
    return b"".join(parts)
