"""Slices tile, plans read every wanted element once, and hardly anything else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainers.checkpoint.shards import CHUNK_BYTES
from finetune_trainers.checkpoint.slices import (
    ReadPlan,
    Source,
    Wanted,
    even_slice,
    flat_group_slices,
    plan_reads,
    tiling_faults,
)

worlds = st.integers(1, 17)
numels = st.lists(st.integers(0, 400), min_size=1, max_size=8)


@given(st.integers(0, 10_000), worlds)
def test_even_slices_of_all_ranks_tile_the_tensor(numel: int, world: int) -> None:
    held = [even_slice(numel, rank, world) for rank in range(world)]
    assert tiling_faults({"t": numel}, [("t", *slice_) for slice_ in held if slice_[0] < slice_[1]]) == []


@given(numels, worlds, st.integers(1, 8))
def test_flat_group_slices_of_all_ranks_tile_every_tensor(sizes: list[int], world: int, alignment: int) -> None:
    held = [piece for rank in range(world) for piece in flat_group_slices(sizes, rank, world, alignment)]
    assert tiling_faults(dict(enumerate(sizes)), held) == []


def test_flat_groups_are_cut_where_deepspeed_cuts_them() -> None:
    # 10 + 7 elements over 2 ranks, padded to 2 × 4: 12 each. By hand: rank 0 ends two elements into the second.
    assert flat_group_slices([10, 7], 0, 2, 4) == [(0, 0, 10), (1, 0, 2)]
    assert flat_group_slices([10, 7], 1, 2, 4) == [(1, 2, 7)]


@pytest.mark.parametrize(
    ("extents", "fault"),
    [
        ([(0, 4)], "elements [4, 10) are missing"),
        ([(4, 10)], "elements [0, 4) are missing"),
        ([(0, 4), (6, 10)], "elements [4, 6) are missing"),
        ([(0, 6), (4, 10)], "elements [4, 6) are there more than once"),
        ([(0, 10), (0, 10)], "elements [0, 10) are there more than once"),
        ([(0, 10), (3, 3)], "elements [3, 3) do not lie in [0, 10)"),
        ([(0, 11)], "elements [0, 11) do not lie in [0, 10)"),
        ([(-1, 10)], "elements [-1, 10) do not lie in [0, 10)"),
    ],
)
def test_what_does_not_tile_is_told_by_its_elements(extents: list[tuple[int, int]], fault: str) -> None:
    assert f"weight param: {fault}" in tiling_faults(
        {("weight", "param"): 10}, [(("weight", "param"), *extent) for extent in extents]
    )


def test_a_slice_of_an_unknown_tensor_is_a_fault() -> None:
    assert tiling_faults({}, [("stray", 0, 1)]) == ["stray is saved, but is not among the tensors"]


@given(st.integers(1, 3000), worlds, st.data())
def test_any_lost_or_doubled_slice_is_found(numel: int, world: int, data: st.DataObject) -> None:
    held = [("t", *even_slice(numel, rank, world)) for rank in range(world)]
    held = [extent for extent in held if extent[1] < extent[2]]
    victim = data.draw(st.sampled_from(held))
    assert tiling_faults({"t": numel}, [extent for extent in held if extent != victim])
    assert tiling_faults({"t": numel}, [*held, victim])


def sources_of(sizes: dict[str, int], world: int, chunk: int = 1024) -> list[Source[str]]:
    """A shard for each rank, slices end to end after 4096 bytes."""
    sources = []
    for rank in range(world):
        offset = 4096
        for key, numel in sizes.items():
            start, end = even_slice(numel, rank, world)
            if start < end:
                sources.append(Source(key, start, end, f"shard-{rank}", offset, 4, chunk))
                offset += (end - start) * 4
    return sources


def wanted_of(sizes: dict[str, int], rank: int, world: int) -> list[Wanted[str]]:
    return [Wanted(key, *even_slice(numel, rank, world)) for key, numel in sizes.items()]


def delivered(plan: ReadPlan[str]) -> list[tuple[str, int, int]]:
    return sorted((piece.source.key, piece.start, piece.end) for read in plan.reads for piece in read.pieces)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6), worlds, worlds, st.integers(1, 4), st.integers(0, 2000))
def test_a_plan_delivers_each_wanted_element_exactly_once(
    lengths: list[int], old: int, new: int, longest: int, gap: int
) -> None:
    sizes = {f"t{index}": length for index, length in enumerate(lengths)}
    for rank in range(new):
        wanted = wanted_of(sizes, rank, new)
        plan = plan_reads(sources_of(sizes, old), wanted, max_read=1024 * longest, max_gap=gap)
        got = delivered(plan)
        for want in wanted:
            pieces = [("x", start - want.start, end - want.start) for key, start, end in got if key == want.key]
            assert tiling_faults({"x": want.end - want.start}, pieces) == []
        for read in plan.reads:
            assert read.end - read.start <= 1024 * longest
            for piece in read.pieces:
                first = piece.source.offset + (piece.start - piece.source.start) * 4
                last = piece.source.offset + (piece.end - piece.source.start) * 4
                assert read.start <= piece.file_start <= first < last <= piece.file_end <= read.end
                assert piece.low % 1024 == 0
                assert piece.high % 1024 == 0 or piece.high == piece.source.size


def test_the_same_world_size_reads_each_shard_once_and_nothing_else() -> None:
    sizes = {"a": 1000, "b": 3000}
    plan = plan_reads(sources_of(sizes, 4), wanted_of(sizes, 1, 4))
    (read,) = plan.reads
    assert (read.file, read.start, read.end) == ("shard-1", 4096, 4096 + 4 * 1000)
    assert plan.amplification == 1.0


def test_wanting_what_nobody_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a: elements \[0, 11\) are wanted and not all are held"):
        plan_reads(sources_of({"a": 10}, 2), [Wanted("a", 0, 11)])
    with pytest.raises(ValueError, match="b: elements"):
        plan_reads(sources_of({"a": 10}, 2), [Wanted("b", 0, 1)])


def smollm() -> dict[str, int]:
    """The tensors of a Llama with 135 million parameters: the smallest model that anybody trains."""
    sizes = {"embed": 49152 * 576, "norm": 576}
    for layer in range(30):
        sizes |= {f"{layer}.{name}": 576 * 576 for name in ("q", "o")}
        sizes |= {f"{layer}.{name}": 192 * 576 for name in ("k", "v")}
        sizes |= {f"{layer}.{name}": 1536 * 576 for name in ("gate", "up", "down")}
        sizes |= {f"{layer}.{name}": 576 for name in ("norm1", "norm2")}
    return sizes


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (1, 3), (3, 4), (8, 6), (2, 2)])
def test_resharding_a_small_model_reads_at_most_a_twentieth_more_than_it_needs(old: int, new: int) -> None:
    sizes = smollm()
    sources = sources_of(sizes, old, CHUNK_BYTES)
    plans = [plan_reads(sources, wanted_of(sizes, rank, new)) for rank in range(new)]
    needed = sum(plan.bytes_needed for plan in plans)
    assert needed == 4 * sum(sizes.values())
    assert sum(plan.bytes_read for plan in plans) <= 1.05 * needed


def test_small_slices_that_lie_side_by_side_are_one_request() -> None:
    sizes = {f"norm{index}": 64 for index in range(1000)}
    plan = plan_reads(sources_of(sizes, 2), wanted_of(sizes, 0, 1))
    assert len(plan.reads) == 2
    assert math.isclose(plan.amplification, 1.0)
