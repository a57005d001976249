"""Putting rows into sequences so that few tokens of room stay empty. Called by `prepare`.

Best-fit decreasing (Johnson 1974; for language models Ding et al. 2024, arXiv:2404.10830): the longest row first,
each into the fullest sequence that still has room for it. Never needs more than 11/9 of the optimum plus 4.
Lengths are small integers, so sequences are kept in buckets by free room and the fullest one that fits is found by
bisection over the rooms that occur: O(n log L) for n rows and sequences of L tokens, whatever the lengths.

Few rows without short ones among them leave a few percent empty that way. Then each sequence is filled in turn with
the rows that fill it best (minimum bin slack, Gupta and Ho 1999), which costs too much for many rows but not for few;
whichever needs fewer sequences is taken.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bins", "one_row_each", "pack", "rows_together"]

Bins = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(rows, offsets): sequence i holds the rows `rows[offsets[i]:offsets[i + 1]]`, in that order."""

AFFORDABLE_BITS = 2**34
"""Bits that filling in turn may have to touch, a second or two: about 10,000 rows and sequences of 2,048 tokens."""


def pack(lengths: NDArray[np.integer], capacity: int, seed: int) -> Bins:
    """Sequences of at most `capacity` tokens that hold every row once.

    `lengths` [n]: tokens of each row, 1 to `capacity`. Rows of equal length are taken in an order drawn from
    `seed`, or neighbours in the file would meet in one sequence for every seed.
    """
    if len(lengths) == 0:
        return one_row_each(0)
    assert lengths.min() >= 1, "an empty row is refused before it is packed"
    assert lengths.max() <= capacity, "a long row is cut or refused before it is packed"
    shuffled = np.argsort(np.random.Philox(seed).random_raw(len(lengths)), kind="stable")
    order = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    descending = lengths[order].tolist()
    bin_of = _best_fit(descending, capacity)
    num_bins = int(bin_of.max()) + 1
    fewest = -(-sum(descending) // capacity)
    if num_bins > fewest and num_bins * len(set(descending)) * capacity <= AFFORDABLE_BITS:
        filled = _fill_in_turn(descending, capacity)
        bin_of = min(bin_of, filled, key=lambda bins: int(bins.max()))
    by_bin = np.argsort(bin_of, kind="stable")
    counts = np.bincount(bin_of)
    return order[by_bin].astype(np.int64), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def one_row_each(num_rows: int) -> Bins:
    """Every row a sequence of its own: packing is off."""
    return rows_together(num_rows, 1)


def rows_together(num_rows: int, size: int) -> Bins:
    """Each `size` rows that follow one another are a sequence: the two answers of a pair, say."""
    assert num_rows % size == 0, "what belongs together is kept or dropped together"
    return np.arange(num_rows, dtype=np.int64), np.arange(0, num_rows + 1, size, dtype=np.int64)


def _best_fit(lengths: list[int], capacity: int) -> NDArray[np.int64]:
    """For each length, in the order given, the number of the bin that it goes into."""
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins with exactly this much room left
    rooms: list[int] = []  # the rooms that occur, ascending
    placed = np.empty(len(lengths), dtype=np.int64)
    num_bins = 0
    for index, length in enumerate(lengths):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            bin_ = num_bins
            num_bins += 1
            left = capacity - length
        else:
            room = rooms[at]
            bin_ = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
            left = room - length
        placed[index] = bin_
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(bin_)
    return placed


def _fill_in_turn(descending: list[int], capacity: int) -> NDArray[np.int64]:
    """As `_best_fit`: each bin takes the longest row left, and of the others those that leave the least room."""
    rows_of: dict[int, list[int]] = {}
    for index, length in enumerate(descending):
        rows_of.setdefault(length, []).append(index)
    placed = np.empty(len(descending), dtype=np.int64)
    bin_ = 0
    while rows_of:
        longest = next(iter(rows_of))  # still in descending order
        for length in (longest, *_best_company(rows_of, longest, capacity - longest)):
            placed[rows_of[length].pop()] = bin_
            if not rows_of[length]:
                del rows_of[length]
        bin_ += 1
    return placed


def _best_company(rows_of: dict[int, list[int]], longest: int, room: int) -> list[int]:
    """Lengths of rows that fill `room` as far as can be, beside one row of length `longest`; long ones rather than
    short ones, which are easier to place later.

    Subset sum: bit t of `reached` says that some of the rows looked at add up to t tokens.
    """
    reached, all_bits = 1, (1 << (room + 1)) - 1
    steps: list[tuple[int, int]] = []  # (a row's length, what could be reached without the row)
    for length, rows in rows_of.items():
        for _ in range(min(len(rows) - (length == longest), room // length)):
            with_row = (reached | reached << length) & all_bits
            if with_row == reached:
                break
            steps.append((length, reached))
            reached = with_row
        if reached >> room:
            break
    total = reached.bit_length() - 1
    company = []
    for length, without_row in reversed(steps):
        if not without_row >> total & 1:
            company.append(length)
            total -= length
    return company
