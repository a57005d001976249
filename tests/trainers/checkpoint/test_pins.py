"""A pinned checkpoint stays: under every policy, through the run's own sweep, and when both happen at once."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.pins import Pin, is_pinned, pin, read_pins, unpin
from finetune_trainers.checkpoint.retention import Best, Retention
from finetune_trainers.checkpoint.storage.errors import StorageMissingError
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import sweep
from tests.trainers.checkpoint.faulting import Crash, FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import save, saved_run, start
from tests.trainers.checkpoint.synthetic import NOON

ONE = Retention(keep_last=1)
FIRST = CheckpointId(1, 10)


def run_of(*steps: int) -> Storage:
    storage = PosixStorage("/run", SimulatedDisk())
    fence = start(storage)
    for step in steps:
        save(storage, fence, step)
    return storage


def test_a_pin_says_who_and_why(storage: Storage) -> None:
    first = save(storage, start(storage), 10).id
    made, is_new = pin(storage, first, "ann", "for the paper", NOON)
    assert (made, is_new) == (Pin(by="ann", reason="for the paper", created=NOON), True)
    assert read_pins(storage) == {first: made}


def test_a_second_pin_leaves_the_first_as_it_is(storage: Storage) -> None:
    first = save(storage, start(storage), 10).id
    made, _ = pin(storage, first, "ann", "for the paper", NOON)
    assert pin(storage, first, "bob", "mine", NOON + timedelta(hours=1)) == (made, False)
    assert read_pins(storage) == {first: made}


def test_unpinning_says_whether_there_was_a_pin(storage: Storage) -> None:
    first = save(storage, start(storage), 10).id
    pin(storage, first, "ann", "", NOON)
    assert [unpin(storage, first), unpin(storage, first)] == [True, False]
    assert read_pins(storage) == {}


def test_what_is_not_there_cannot_be_pinned(storage: Storage) -> None:
    save(storage, start(storage), 10)
    with pytest.raises(StorageMissingError, match="0000000020-e00001 is not there, or is being deleted"):
        pin(storage, CheckpointId(1, 20), "ann", "", NOON)
    assert read_pins(storage) == {}


@pytest.mark.parametrize("content", [b"", b"{}", b'{"kind":"pin"}'])
def test_a_damaged_pin_holds_its_checkpoint(storage: Storage, content: bytes) -> None:
    fence = start(storage)
    first = save(storage, fence, 10).id
    save(storage, fence, 20)
    storage.replace(layout.pin(first), content)
    assert read_pins(storage) == {first: None}
    assert sweep(storage, ONE, fence).deleted == ()


def test_a_pin_is_made_at_any_moment_of_a_sweep_and_keeps_its_promise() -> None:
    """At each request of a sweep in turn somebody pins what it is about to delete."""
    at = refused = kept = 0
    while True:
        storage = run_of(10, 20)
        promised: list[Pin] = []

        def ask(storage: Storage = storage, promised: list[Pin] = promised) -> None:
            with suppress(StorageMissingError):
                promised.append(pin(storage, FIRST, "ann", "", NOON)[0])

        schedule = Schedule(at=at, kind="delay", delay=ask)
        sweep(FaultingStorage(storage, schedule), ONE)
        if not schedule.fired:
            break
        where = schedule.names[at]
        if promised:
            kept += 1
            assert listed(storage)[FIRST].is_settled, where
            storage.delete([layout.manifest(CheckpointId(1, 20))])
            found = find_newest(storage, deep=True).manifest
            assert found is not None, where
            assert found.id == FIRST, where
        else:
            refused += 1
            assert read_pins(storage) == {}, where
            assert FIRST not in listed(storage), where
        at += 1
    assert kept > 5
    assert refused > 5


def test_a_sweep_happens_at_any_moment_of_pinning_and_the_promise_is_kept() -> None:
    at = 0
    while True:
        storage = run_of(10, 20)
        schedule = Schedule(at=at, kind="delay", delay=partial(sweep, storage, ONE))
        promised = False
        with suppress(StorageMissingError):
            pin(FaultingStorage(storage, schedule), FIRST, "ann", "", NOON)
            promised = True
        if not schedule.fired:
            break
        assert (FIRST in listed(storage)) == promised == is_pinned(storage, FIRST), schedule.names[at]
        at += 1
    assert at == 6, "before and after each of its three requests"


def test_a_sweep_that_dies_leaves_a_pinned_checkpoint_with_all_its_files() -> None:
    at = 0
    while True:
        storage = run_of(10, 20)
        files = dict(listed(storage)[FIRST].sizes)
        pin(storage, FIRST, "ann", "", NOON)
        schedule = Schedule(at=at)
        with suppress(Crash):
            sweep(FaultingStorage(storage, schedule), ONE)
        if not schedule.fired:
            break
        assert dict(listed(storage)[FIRST].sizes) == files, schedule.names[at]
        at += 1


def test_what_is_half_deleted_goes_although_a_pin_is_left() -> None:
    """Whoever pinned it was told that it cannot be, and died before taking the pin back."""
    storage = run_of(10, 20)
    storage.create(layout.tombstone(FIRST), b"half")
    storage.delete([layout.manifest(FIRST)])
    storage.create(layout.pin(FIRST), b"left")
    assert sweep(storage, ONE).deleted == (FIRST,)


policies = st.builds(
    Retention,
    keep_last=st.none() | st.integers(1, 4),
    keep_every=st.none() | st.sampled_from([10, 20, 35]),
    keep_best=st.none() | st.builds(Best, metric=st.just("loss"), mode=st.sampled_from(["min", "max"])),
    quota_bytes=st.none() | st.integers(1, 200_000),
)


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([10, 20, 30, 40, 50]), min_size=1, unique=True),
    st.sets(st.sampled_from([10, 20, 30, 40, 50])),
    st.sets(st.sampled_from([10, 20, 30, 40, 50])),
    policies,
)
def test_no_policy_deletes_the_newest_whole_one_or_a_pinned_one(
    steps: list[int], pinned: set[int], damaged: set[int], policy: Retention
) -> None:
    storage, fence = saved_run(steps, pinned, damaged)
    before = find_newest(storage).manifest
    sweep(storage, policy, fence)
    after = find_newest(storage, deep=True).manifest
    assert (after and after.id) == (before and before.id)
    assert {CheckpointId(1, step) for step in pinned & set(steps)} <= set(listed(storage))
