from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from finetune_trainers.data.order import TrainOrder
from finetune_trainers.prepared import PreparedSource


def source(num_sequences: int, weight: float = 1.0) -> PreparedSource:
    return PreparedSource(
        folder="/none",
        content="c",
        source="file:///none.jsonl",
        weight=weight,
        num_rows=num_sequences,
        num_sequences=num_sequences,
        num_tokens=num_sequences,
        num_trained_tokens=num_sequences,
        packing_efficiency=1.0,
    )


def epoch_of(order: TrainOrder, epoch: int) -> list[tuple[int, int]]:
    n = order.sequences_per_epoch
    slots = [order.slot(position) for position in range(epoch * n, (epoch + 1) * n)]
    assert {slot[0] for slot in slots} == {epoch}
    return [slot[1:] for slot in slots]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
seeds = st.integers(0, 2**63 - 1)


@given(sizes=sizes, seed=seeds, epoch=st.integers(0, 5))
def test_an_epoch_holds_every_sequence_of_every_source_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = TrainOrder([source(size) for size in sizes], seed)
    expected = {(index, sequence) for index, size in enumerate(sizes) for sequence in range(size)}
    assert Counter(epoch_of(order, epoch)) == Counter(expected)


@given(sizes=sizes, seed=seeds, positions=st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_entering_anywhere_gives_what_going_there_gives(sizes: list[int], seed: int, positions: list[int]) -> None:
    walked = TrainOrder([source(size) for size in sizes], seed)
    stream = [walked.slot(position) for position in range(max(positions) + 1)]
    entered = TrainOrder([source(size) for size in sizes], seed)
    assert [entered.slot(position) for position in positions] == [stream[position] for position in positions]


@given(size=st.integers(1, 60), weight=st.floats(0.05, 3.0), seed=seeds)
def test_a_weight_is_the_number_of_times_a_source_is_seen_per_epoch(size: int, weight: float, seed: int) -> None:
    order = TrainOrder([source(size, weight), source(7)], seed)
    counts = Counter(sequence for index, sequence in epoch_of(order, 0) if index == 0)
    assert abs(counts.total() - weight * size) <= 0.5 + 1e-6
    # No sequence comes more than once more often than another.
    assert not counts or max(counts.values()) - (min(counts.values()) if len(counts) == size else 0) <= 1


def test_half_a_source_is_its_other_half_in_the_next_epoch() -> None:
    order = TrainOrder([source(10, 0.5)], seed=3)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert len(first) == len(second) == 5
    assert not set(first) & set(second)


@given(sizes=sizes, weight=st.floats(0.2, 2.5), seed=seeds, stop=st.integers(0, 150))
def test_what_is_visited_is_named_once_in_the_order_of_the_first_visit(
    sizes: list[int], weight: float, seed: int, stop: int
) -> None:
    order = TrainOrder([source(3), *(source(size, weight) for size in sizes)], seed)
    stream = [order.slot(position)[1:] for position in range(stop)]
    assert order.visited(stop) == list(dict.fromkeys(stream))


def test_epochs_and_seeds_differ_in_order() -> None:
    order = TrainOrder([source(50)], seed=1)
    orders = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(TrainOrder([source(50)], seed=2), 0)]
    assert all(one != other for index, one in enumerate(orders) for other in orders[index + 1 :])


def test_the_order_is_the_same_in_every_version() -> None:
    """A resumed run must find the order that it left: these numbers may only change with CODE_VERSION."""
    order = TrainOrder([source(6), source(4, 0.5)], seed=7)
    assert epoch_of(order, 0) == [(0, 4), (0, 1), (1, 2), (0, 3), (0, 2), (1, 3), (0, 5), (0, 0)]
