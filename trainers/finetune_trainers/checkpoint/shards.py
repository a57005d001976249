"""The bytes of one rank's file: a safetensors header, slices laid end to end, and a digest for each chunk. Pure.

    8 bytes       length of the header, little endian
    header        JSON, {name: {dtype, shape, data_offsets}}, padded with spaces so that the data begins at 4096 × n
    slices        in the order of the header, elements in little endian
    __digests__   U8 [chunks, 32]: blake3 of each chunk of each slice, in that order

Any reader of safetensors opens a shard. All of it but the data follows from the list of slices, so a file can be
written as a stream, and every byte of it can be verified: slices and digests by the manifest, the header by making it
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Extent, Intent, ShardRecord
from finetune_trainers.checkpoint.safetensors_file import Entry, safetensors_header

__all__ = [
    "CHUNK_BYTES",
    "DIGEST_BYTES",
    "SHARD_BYTES",
    "ShardPlan",
    "Slice",
    "chunk_digests",
    "digest_of_digests",
    "num_chunks",
    "shared_out",
    "whole_chunks",
]

CHUNK_BYTES = 32 << 10
"""Small, because a reader of another world size must read whole chunks to verify them: with 64 KiB a model of 135 M
parameters, saved by 3 ranks and restored by 4, would read 7 % more than it needs. The digests are 0.1 %."""
SHARD_BYTES = 64 << 20
"""Of data in one file. A bucket takes a file of this size in one conditional request: it is there whole or not at all,
no parts of an upload are ever left behind, and what has to be sent again after a failure is little."""
DIGEST_BYTES = 32
_ALIGNMENT = 4096
_DIGESTS = "__digests__"


class Slice(NamedTuple):
    """Elements [start, end) of a state of the tensor at an index of the intent."""

    tensor: int
    state: str
    start: int
    end: int


def shared_out(intent: Intent, slices: Sequence[Slice], shard_bytes: int, chunk_bytes: int) -> list[list[Slice]]:
    """`slices` in order, as the contents of files of at most `shard_bytes` each; long ones are cut between chunks."""
    assert shard_bytes >= chunk_bytes
    files: list[list[Slice]] = [[]]
    left = shard_bytes
    for piece in slices:
        item = ITEM_BYTES[intent.tensors[piece.tensor].states[piece.state]]
        start = piece.start
        while start < piece.end:
            fits = piece.end - start
            if fits * item > left:
                fits = left // chunk_bytes * chunk_bytes // item
            if fits:
                files[-1].append(piece._replace(start=start, end=start + fits))
                start += fits
                left -= fits * item
            if start < piece.end:
                files.append([])
                left = shard_bytes
    return files


def num_chunks(size: int, chunk_bytes: int) -> int:
    return -(-size // chunk_bytes)


def whole_chunks(size: int, chunk_bytes: int) -> int:
    """`size` or a little less: a multiple of chunks, at least one."""
    return max(size // chunk_bytes, 1) * chunk_bytes


def chunk_digests(data: memoryview, chunk_bytes: int) -> bytes:
    """The digests, end to end, of `data` (bytes from the start of a chunk on) cut into chunks."""
    return b"".join(blake3(data[begin : begin + chunk_bytes]).digest() for begin in range(0, len(data), chunk_bytes))


def digest_of_digests(digests: bytes) -> str:
    """What stands for a whole slice: in hexadecimal."""
    return blake3(digests).hexdigest()


@dataclass(frozen=True)
class ShardPlan:
    """A shard before its data: everything but the digests."""

    header: bytes
    """All that precedes the first slice."""
    slices: tuple[Slice, ...]
    offsets: tuple[int, ...]
    """In the file, one for each slice."""
    table_offset: int
    bytes: int
    chunk_bytes: int

    @classmethod
    def of(cls, intent: Intent, rank: int, slices: Sequence[Slice], chunk_bytes: int = CHUNK_BYTES) -> ShardPlan:
        """Lays out `slices` in the order given, which should go state by state: readers often want one state.

        Types of larger elements must come before those of smaller ones, or elements would not be aligned: ValueError.
        """
        items = [ITEM_BYTES[intent.tensors[piece.tensor].states[piece.state]] for piece in slices]
        if items != sorted(items, reverse=True):
            raise ValueError("slices with larger elements must come first")
        sizes = [(piece.end - piece.start) * item for piece, item in zip(slices, items, strict=True)]
        chunks = sum(num_chunks(size, chunk_bytes) for size in sizes)
        header = _header(intent, rank, slices, sizes, chunks)
        offsets, upto = [], len(header)
        for size in sizes:
            offsets.append(upto)
            upto += size
        return cls(header, tuple(slices), tuple(offsets), upto, upto + chunks * DIGEST_BYTES, chunk_bytes)

    def record(self, file: str, digests: Sequence[str]) -> ShardRecord:
        """The receipt's entry, once the digest of each slice is known."""
        extents = zip(self.slices, self.offsets, digests, strict=True)
        return ShardRecord(
            file=file,
            bytes=self.bytes,
            chunk_bytes=self.chunk_bytes,
            table_offset=self.table_offset,
            extents=tuple(Extent(*piece, offset, digest) for piece, offset, digest in extents),
        )


def _header(intent: Intent, rank: int, slices: Sequence[Slice], sizes: Sequence[int], chunks: int) -> bytes:
    entries = []
    for piece, size in zip(slices, sizes, strict=True):
        tensor = intent.tensors[piece.tensor]
        name = f"{tensor.role}/{tensor.name}/{piece.state}[{piece.start}:{piece.end}]"
        entries.append(Entry(name, tensor.states[piece.state], (piece.end - piece.start,), size))
    entries.append(Entry(_DIGESTS, "U8", (chunks, DIGEST_BYTES), chunks * DIGEST_BYTES))
    about = {"step": str(intent.step), "epoch": str(intent.epoch), "rank": str(rank)}
    return safetensors_header(entries, {"format": "finetune-operator.io/shard", **about}, _ALIGNMENT)
