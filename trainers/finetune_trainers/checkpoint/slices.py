"""Arithmetic on flat tensors: who holds which elements, whether all are held once, and which bytes to read. Pure.

A tensor is seen as its elements in row-major order, 0 to numel. Every rank saves slices [start, end) of it; for each
(tensor, state) the slices of all ranks tile [0, numel): none missing, none twice. `tiling_faults` says whether they do,
at commit and again at load. Since slices are ranges, a rank of any other world size finds what it needs as ranges of
bytes in files: `plan_reads`.

Digests are taken over chunks of a slice, counted from the slice's start. A read that begins or ends inside a chunk
is widened to the whole chunk, so that everything that is read can be verified.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

__all__ = [
    "MAX_GAP",
    "MAX_READ",
    "Piece",
    "Read",
    "ReadPlan",
    "Source",
    "Wanted",
    "even_slice",
    "flat_group_slices",
    "plan_reads",
    "tiling_faults",
]

Key = TypeVar("Key", bound=Hashable)

MAX_READ = 64 << 20
"""Bytes of the longest read, unless another is asked for."""
MAX_GAP = 16 << 10
"""Bytes between two wanted ranges that are read along: a request costs more than they do."""


def even_slice(numel: int, rank: int, world: int) -> tuple[int, int]:
    """What `rank` of `world` holds when a tensor is cut into slices of ceil(numel / world), as ZeRO-3 does.

    The last ranks hold less, or nothing (start == end).
    """
    assert 0 <= rank < world
    each = -(-numel // world)
    return min(rank * each, numel), min((rank + 1) * each, numel)


def flat_group_slices(numels: Sequence[int], rank: int, world: int, alignment: int = 1) -> list[tuple[int, int, int]]:
    """What `rank` holds when tensors are laid end to end and the whole is cut into equal parts, as ZeRO-1 and 2 do.

    -> (index into `numels`, start, end) for every tensor of which the rank holds something. The whole is padded to a
    multiple of world × alignment elements; the padding belongs to nobody.
    """
    unit = world * alignment
    each = -(-sum(numels) // unit) * alignment
    first, last = rank * each, (rank + 1) * each
    held, offset = [], 0
    for index, numel in enumerate(numels):
        start, end = max(first - offset, 0), min(last - offset, numel)
        if start < end:
            held.append((index, start, end))
        offset += numel
    return held


def tiling_faults(numels: Mapping[Key, int], extents: Iterable[tuple[Key, int, int]]) -> list[str]:
    """A sentence for each gap, overlap and stray slice; none when the extents tile every [0, numel) exactly once.

    Empty extents are faults too: nobody has a reason to write one.
    """
    held: defaultdict[Key, list[tuple[int, int]]] = defaultdict(list)
    for key, start, end in extents:
        held[key].append((start, end))
    faults = [f"{_say(key)} is saved, but is not among the tensors" for key in held if key not in numels]
    for key, numel in numels.items():
        faults += [f"{_say(key)}: {fault}" for fault in _faults_of_one(numel, sorted(held[key]))]
    return faults


def _faults_of_one(numel: int, extents: list[tuple[int, int]]) -> Iterator[str]:
    upto = 0
    for start, end in extents:
        if not 0 <= start < end <= numel:
            yield f"elements [{start}, {end}) do not lie in [0, {numel})"
        elif start < upto:
            yield f"elements [{start}, {min(end, upto)}) are there more than once"
        elif start > upto:
            yield f"elements [{upto}, {start}) are missing"
        upto = max(upto, end)
    if upto < numel:
        yield f"elements [{upto}, {numel}) are missing"


def _say(key: Hashable) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


class Wanted(NamedTuple, Generic[Key]):
    """Elements [start, end) that somebody needs."""

    key: Key
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Source(Generic[Key]):
    """Elements [start, end) as they lie in a file from byte `offset` on, `item` bytes each, with a digest for every
    `chunk` bytes."""

    key: Key
    start: int
    end: int
    file: str
    offset: int
    item: int
    chunk: int

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.end - self.start) * self.item


@dataclass(frozen=True, slots=True)
class Piece(Generic[Key]):
    """Elements [start, end), a part of what is `wanted`, from `source`. `low` and `high` bound the whole chunks that
    hold them, in bytes from the source's beginning."""

    wanted: Wanted[Key]
    source: Source[Key]
    start: int
    end: int
    low: int
    high: int

    @property
    def whole(self) -> bool:
        """Whether all of the source is read."""
        return self.low == 0 and self.high == self.source.size

    @property
    def file_start(self) -> int:
        return self.source.offset + self.low

    @property
    def file_end(self) -> int:
        return self.source.offset + self.high


@dataclass(frozen=True, slots=True)
class Read(Generic[Key]):
    """One request: bytes [start, end) of a file, and what is in them."""

    file: str
    start: int
    end: int
    pieces: tuple[Piece[Key], ...]


@dataclass(frozen=True, slots=True)
class ReadPlan(Generic[Key]):
    """All requests of one reader, file by file and in the order of offsets."""

    reads: tuple[Read[Key], ...]
    bytes_needed: int

    @property
    def bytes_read(self) -> int:
        return sum(read.end - read.start for read in self.reads)

    @property
    def amplification(self) -> float:
        """Bytes read ÷ bytes needed; 1 when nothing is needed."""
        return self.bytes_read / self.bytes_needed if self.bytes_needed else 1.0


def plan_reads(
    sources: Iterable[Source[Key]],
    wanted: Iterable[Wanted[Key]],
    max_read: int = MAX_READ,
    max_gap: int = MAX_GAP,
) -> ReadPlan[Key]:
    """Which bytes give the `wanted` elements, in as few requests as `max_read` and `max_gap` (bytes) allow.

    Raises ValueError when an element that is wanted lies in no source.
    """
    found = [piece for want, held in _holders(sources, wanted) for piece in _pieces(want, held, max_read)]
    needed = sum((piece.end - piece.start) * piece.source.item for piece in found)
    found.sort(key=lambda piece: (piece.source.file, piece.file_start, piece.file_end))
    return ReadPlan(tuple(_coalesced(found, max_read, max_gap)), needed)


def _holders(
    sources: Iterable[Source[Key]], wanted: Iterable[Wanted[Key]]
) -> Iterator[tuple[Wanted[Key], list[Source[Key]]]]:
    """Each want with the sources that overlap it, in order."""
    by_key: defaultdict[Key, list[Source[Key]]] = defaultdict(list)
    for source in sources:
        by_key[source.key].append(source)
    starts = {}
    for key, held in by_key.items():
        held.sort(key=lambda source: source.start)
        starts[key] = [source.start for source in held]
    for want in wanted:
        held = by_key.get(want.key, [])
        first = bisect_right(starts.get(want.key, []), want.start) - 1
        last = bisect_right(starts.get(want.key, []), want.end - 1)
        overlapping = held[max(first, 0) : last]
        if want.start < want.end:
            _check_covered(want, overlapping)
            yield want, overlapping


def _check_covered(want: Wanted[Key], held: list[Source[Key]]) -> None:
    contiguous = all(left.end == right.start for left, right in pairwise(held))
    if not held or held[0].start > want.start or held[-1].end < want.end or not contiguous:
        raise ValueError(f"{_say(want.key)}: elements [{want.start}, {want.end}) are wanted and not all are held")


def _pieces(want: Wanted[Key], held: list[Source[Key]], max_read: int) -> Iterator[Piece[Key]]:
    """The want cut by sources, widened to chunks, and cut again where a request would be too long."""
    for source in held:
        chunk, longest = source.chunk, max_read // source.chunk * source.chunk
        assert longest, "a request holds at least one chunk"
        start, end = max(want.start, source.start), min(want.end, source.end)
        low = (start - source.start) * source.item // chunk * chunk
        high = min(-(-(end - source.start) * source.item // chunk) * chunk, source.size)
        for begin in range(low, high, longest):
            stop = min(begin + longest, high)
            assert begin % source.item == 0, "a chunk is a multiple of every element's size"
            yield Piece(
                want,
                source,
                max(start, source.start + begin // source.item),
                min(end, source.start + stop // source.item),
                begin,
                stop,
            )


def _coalesced(pieces: list[Piece[Key]], max_read: int, max_gap: int) -> Iterator[Read[Key]]:
    """`pieces` are in the order of their place in the files."""
    batch: list[Piece[Key]] = []
    start = end = 0
    for piece in pieces:
        reach = max(end, piece.file_end)
        apart = bool(batch) and (
            piece.source.file != batch[0].source.file or piece.file_start - end > max_gap or reach - start > max_read
        )
        if apart:
            yield Read(batch[0].source.file, start, end, tuple(batch))
            batch = []
        if not batch:
            start, reach = piece.file_start, piece.file_end
        batch.append(piece)
        end = reach
    if batch:
        yield Read(batch[0].source.file, start, end, tuple(batch))
