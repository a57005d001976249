"""Slices of a checkpoint for any rank of any world size, verified as they are read.

Each reader asks for the elements that it needs and gives the memory that they go to. It reads ranges of bytes, several
at once; nothing is read twice, nothing is gathered, and nothing is converted on disk beforehand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.manifest import Extent, Manifest, SliceKey
from finetune_trainers.checkpoint.shards import DIGEST_BYTES, chunk_digests, digest_of_digests, num_chunks
from finetune_trainers.checkpoint.slices import Piece, Read, ReadPlan, Source, Wanted, plan_reads
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.verify import Damage, differing_rows, rows_damage

__all__ = ["DamagedError", "RestorePlan", "SliceReader", "Targets"]

_FEW_BYTES = 16 << 20

Targets = Mapping[Wanted[SliceKey], memoryview]
"""What is wanted, and the memory for it: bytes, as many as the elements have."""


class DamagedError(StorageTornError):
    """What was read is not what was saved; the message names files and elements."""


@dataclass(frozen=True)
class RestorePlan:
    """The requests of one reader, and the digests that must be read along: of slices that are not read whole."""

    reads: ReadPlan[SliceKey]
    tables: Mapping[str, tuple[int, int]]
    """File -> from where to where digests are read, in one request."""

    @property
    def bytes_read(self) -> int:
        return self.reads.bytes_read + sum(end - start for start, end in self.tables.values())

    @property
    def num_requests(self) -> int:
        return len(self.reads.reads) + len(self.tables)

    @property
    def amplification(self) -> float:
        """Bytes read ÷ bytes needed."""
        return self.bytes_read / self.reads.bytes_needed if self.reads.bytes_needed else 1.0


class _Place(NamedTuple):
    """What is known of a source beside where it is."""

    extent: Extent
    table_offset: int
    """In the file: of the digests of this slice's chunks."""
    num_chunks: int


class _Table(NamedTuple):
    """Digests of chunks, as they lie in a file from `offset` on; or why they could not be read."""

    offset: int
    digests: bytes
    fault: str = ""


class SliceReader:
    """Reads one checkpoint. Indexed once, so that many small reads cost no more than few large ones."""

    def __init__(self, storage: Storage, manifest: Manifest, max_read: int | None = None) -> None:
        """`max_read`: bytes of the longest request; None: as many as suit the storage."""
        self._storage = storage
        self._max_read = max_read or storage.requests.longest
        self._places = _places(manifest)
        self._by_key: defaultdict[SliceKey, list[Source[SliceKey]]] = defaultdict(list)
        for source in manifest.sources():
            self._by_key[source.key].append(source)

    def plan(self, wanted: Iterable[Wanted[SliceKey]]) -> RestorePlan:
        """What reading `wanted` will cost. Raises ValueError when the checkpoint does not have it."""
        wanted = list(wanted)
        sources = (source for key in {want.key for want in wanted} for source in self._by_key.get(key, ()))
        plan = plan_reads(sources, wanted, self._max_read)
        in_part = (source for source, rows in _rows_read(plan).items() if rows < self._place(source).num_chunks)
        return RestorePlan(plan, self._table_spans(in_part))

    def read(self, targets: Targets) -> RestorePlan:
        """Fill the memory of `targets`. When it returns, every byte was verified.

        Raises DamagedError, and then the memory may hold anything.
        """
        restore = self.plan(targets)
        # Made before the threads start: two of them may read chunks of one source.
        digests: _Digests = {piece.source: {} for read in restore.reads.reads for piece in read.pieces}
        with _pool(self._num_threads(restore)) as run:
            list(run(lambda read: self._read(read, targets, digests), restore.reads.reads))
            others = [source for source, collected in digests.items() if not self._is_whole(source, collected)]
            spans = self._table_spans(others)
            tables = dict(zip(spans, run(self._table, spans, spans.values()), strict=True))
            damages = list(chain.from_iterable(self._damage(one, digests[one], tables[one.file]) for one in others))
        if damages:
            more = f"; and {len(damages) - 3} more" if len(damages) > 3 else ""
            raise DamagedError("; ".join(map(str, damages[:3])) + more)
        return restore

    def _num_threads(self, restore: RestorePlan) -> int:
        """A disk answers a few megabytes before threads are there; a bucket takes its time for any request."""
        requests = self._storage.requests
        if restore.bytes_read <= _FEW_BYTES and not requests.buffered:
            return 1
        return min(len(restore.reads.reads), requests.at_once)

    def _place(self, source: Source[SliceKey]) -> _Place:
        return self._places[source.file, source.offset]

    def _read(self, read: Read[SliceKey], targets: Targets, digests: _Digests) -> None:
        parts, landings = _landings(read, targets)
        try:
            self._storage.read_into(read.file, read.start, parts)
        except (StorageMissingError, StorageTornError) as error:
            piece = read.pieces[0]
            damage = Damage(read.file, error.message, piece.source.key, piece.start, piece.end)
            raise DamagedError(str(damage)) from error
        for landing in landings:
            _collect(landing, digests[landing.source])
            if landing.to is not None:
                landing.to[:] = landing.content[landing.begin : landing.begin + len(landing.to)]

    def _is_whole(self, source: Source[SliceKey], collected: dict[int, bytes]) -> bool:
        """Whether all of a source was read, and is what was saved."""
        place = self._place(source)
        if len(collected) < place.num_chunks:
            return False
        return digest_of_digests(b"".join(collected[number] for number in sorted(collected))) == place.extent.digest

    def _table_spans(self, sources: Iterable[Source[SliceKey]]) -> dict[str, tuple[int, int]]:
        """Of each file, from where to where the digests of its sources' chunks lie. One request is cheaper than many,
        and all digests of a file are a thousandth of it."""
        spans: dict[str, tuple[int, int]] = {}
        for source in sources:
            place = self._place(source)
            begin, end = place.table_offset, place.table_offset + place.num_chunks * DIGEST_BYTES
            low, high = spans.get(source.file, (begin, end))
            spans[source.file] = min(low, begin), max(high, end)
        return spans

    def _table(self, file: str, span: tuple[int, int]) -> _Table:
        try:
            return _Table(span[0], bytes(self._storage.read_range(file, *span)))
        except (StorageMissingError, StorageTornError) as error:
            return _Table(span[0], b"", error.message)

    def _damage(self, source: Source[SliceKey], collected: dict[int, bytes], table: _Table) -> list[Damage]:
        """What is wrong with the chunks of a source that were read."""
        place, numbers = self._place(source), sorted(collected)
        if table.fault:
            return [Damage(source.file, table.fault, source.key, source.start, source.end)]
        first = place.table_offset - table.offset
        digests = table.digests[first : first + place.num_chunks * DIGEST_BYTES]
        if digest_of_digests(digests) != place.extent.digest:
            text = "the bytes, or the digests beside them, are not those that were saved"
            return [Damage(source.file, text, source.key, source.start, source.end)]
        found = b"".join(collected[number] for number in numbers)
        expected = b"".join(digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] for number in numbers)
        bad = [numbers[row] for row in differing_rows(found, expected)]
        return [rows_damage(source.file, source.key, place.extent, source.item, source.chunk, bad)] if bad else []


_Digests = dict[Source[SliceKey], dict[int, bytes]]
"""Of each source, chunk number -> digest of what was read."""


@contextmanager
def _pool(num_threads: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` of several threads; this one's where a thread would have nothing beside it."""
    if num_threads < 2:
        yield map
        return
    with ThreadPoolExecutor(num_threads) as pool:
        yield pool.map


class _Landing(NamedTuple):
    """Whole chunks of a source, from byte `low` of it on, and the memory that they come to lie in."""

    source: Source[SliceKey]
    low: int
    content: memoryview
    to: memoryview | None
    """Where a part of them is wanted, from byte `begin` of them on; None for those that lie there already."""
    begin: int = 0


def _landings(read: Read[SliceKey], targets: Targets) -> tuple[list[memoryview], list[_Landing]]:
    """What a request fills, in order, and what is found there. Chunks that are wanted whole, which are nearly all, are
    read straight to where they are wanted."""
    if any(left.file_end > right.file_start for left, right in pairwise(read.pieces)):  # they share chunks
        data = memoryview(bytearray(read.end - read.start))
        contents = (data[one.file_start - read.start : one.file_end - read.start] for one in read.pieces)
        return [data], [_beside(one, targets, content) for one, content in zip(read.pieces, contents, strict=True)]
    parts, landings, upto = [], [], read.start
    for piece in read.pieces:
        found = _of_piece(piece, targets)
        parts += [memoryview(bytearray(piece.file_start - upto)), *(landing.content for landing in found)]
        landings += found
        upto = piece.file_end
    return [part for part in parts if part], landings


def _of_piece(piece: Piece[SliceKey], targets: Targets) -> list[_Landing]:
    """The chunks at the ends of a piece may be wanted in part, and are read beside what is wanted."""
    source, (begin, end) = piece.source, _span(piece)
    first = min(-(-begin // source.chunk) * source.chunk, piece.high)
    last = piece.high if end == piece.high else end // source.chunk * source.chunk
    if first >= last:
        return [_beside(piece, targets, memoryview(bytearray(piece.high - piece.low)))]
    wanted = _part(piece, targets)
    head, tail = memoryview(bytearray(first - piece.low)), memoryview(bytearray(piece.high - last))
    landings = [
        _Landing(source, piece.low, head, wanted[: first - begin], begin - piece.low),
        _Landing(source, first, wanted[first - begin : last - begin], None),
        _Landing(source, last, tail, wanted[last - begin :]),
    ]
    return [landing for landing in landings if landing.content]


def _beside(piece: Piece[SliceKey], targets: Targets, content: memoryview) -> _Landing:
    return _Landing(piece.source, piece.low, content, _part(piece, targets), _span(piece)[0] - piece.low)


def _span(piece: Piece[SliceKey]) -> tuple[int, int]:
    """What is wanted, in bytes of the source."""
    first, item = piece.source.start, piece.source.item
    return (piece.start - first) * item, (piece.end - first) * item


def _part(piece: Piece[SliceKey], targets: Targets) -> memoryview:
    """The memory of what the piece is, of all that is wanted."""
    first, item = piece.wanted.start, piece.source.item
    return targets[piece.wanted][(piece.start - first) * item : (piece.end - first) * item]


def _collect(landing: _Landing, collected: dict[int, bytes]) -> None:
    chunk = landing.source.chunk
    rows, first = chunk_digests(landing.content, chunk), landing.low // chunk
    for number in range(len(rows) // DIGEST_BYTES):
        collected[first + number] = rows[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]


def _places(manifest: Manifest) -> dict[tuple[str, int], _Place]:
    places, folder = {}, layout.folder(manifest.id)
    for receipt in manifest.receipts:
        for shard in receipt.shards:
            offset = shard.table_offset
            for extent in shard.extents:
                count = num_chunks(extent.size(manifest.item(extent)), shard.chunk_bytes)
                places[folder + shard.file, extent.offset] = _Place(extent, offset, count)
                offset += count * DIGEST_BYTES
    return places


def _rows_read(plan: ReadPlan[SliceKey]) -> dict[Source[SliceKey], int]:
    """How many chunks of each source are read; two pieces may share one."""
    rows: defaultdict[Source[SliceKey], set[int]] = defaultdict(set)
    for read in plan.reads:
        for piece in read.pieces:
            chunk = piece.source.chunk
            rows[piece.source].update(range(piece.low // chunk, num_chunks(piece.high, chunk)))
    return {source: len(numbers) for source, numbers in rows.items()}
