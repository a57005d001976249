"""Deleting by hand: what is said beforehand is what is done, and what must stay stays."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainers.checkpoint.admin.activity import InUseError
from finetune_trainers.checkpoint.admin.upkeep import Mandate, collected
from finetune_trainers.checkpoint.commit import begin
from finetune_trainers.checkpoint.fence import SupersededError, current_epoch
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.pins import pin
from finetune_trainers.checkpoint.retention import Best, Retention
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.trainers.checkpoint.faulting import Crash, FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, save, saved_run, start, write_all
from tests.trainers.checkpoint.synthetic import NOON
from tests.trainers.checkpoint.test_crashes import blob, put

ONE, ALL = Retention(keep_last=1), Retention(keep_last=None)
EVENING = NOON + timedelta(hours=8)
GO = Mandate("ann@host", EVENING, dry_run=False)
ONLY_SAY = Mandate("ann@host", EVENING, dry_run=True)


def there(storage: Storage) -> list[int]:
    return sorted(checkpoint.step for checkpoint in listed(storage))


def everything(storage: Storage) -> dict[str, bytes]:
    return {stored.name: storage.read(stored.name) for stored in storage.list("")}


def left_behind(storage: Storage) -> Storage:
    """By a run that died: three checkpoints, one that lacks only its manifest, one half written, shared files."""
    fence = start(storage)
    put(storage, b"nobody's")
    put(storage, b"everybody's")
    for step in (10, 20, 30):
        save(storage, fence, step, metrics={"loss": 1.0 / step}, blobs=(blob(b"everybody's"),))
    write_all(storage, intent_of(fence, 40))
    write_all(storage, intent_of(fence, 50), ranks=[1])
    return storage


def test_a_dry_run_says_what_is_done_and_changes_nothing(storage: Storage) -> None:
    left_behind(storage)
    before = everything(storage)
    said = collected(storage, ONE, ONLY_SAY)
    assert everything(storage) == before
    done = collected(storage, ONE, GO)
    ours = {"dry_run": False, "activity": None}
    assert said.model_copy(update=ours) == done.model_copy(update=ours)
    assert done.completed == ["0000000040-e00001"]
    assert [one.id for one in done.deleted] == [f"00000000{step}-e00001" for step in (50, 30, 20, 10)]
    assert [(one.id, one.reason) for one in done.kept] == [
        ("0000000040-e00001", "the newest that is whole; one of the last 1")
    ]
    assert there(storage) == [40]


def test_what_is_freed_is_what_is_gone(storage: Storage) -> None:
    left_behind(storage)
    before = everything(storage)
    done = collected(storage, ONE, GO)
    after = everything(storage)
    gone = {name: len(data) for name, data in before.items() if name not in after}
    assert done.blobs == 2, "the completed one names none"
    assert done.blob_bytes == len(b"nobody's") + len(b"everybody's")
    folders = [size for name, size in gone.items() if name.startswith("ckpt/")]
    given_up = 200  # at most: the word about step 50 was written and deleted again
    assert 0 < done.bytes - done.blob_bytes - sum(folders) < given_up


def test_a_run_that_seems_to_be_at_work_is_left_alone(storage: Storage) -> None:
    left_behind(storage)
    before = everything(storage)
    early = NOON + timedelta(minutes=30)
    with pytest.raises(InUseError, match="test seems to be at work there"):
        collected(storage, ONE, Mandate("ann", early, dry_run=False))
    said = collected(storage, ONE, Mandate("ann", early, dry_run=True))
    assert [one.id for one in said.deleted] == ["0000000020-e00001", "0000000010-e00001"]
    assert (said.completed, said.blobs) == ([], 0), "what it has begun, and what it shares, may be needed"
    assert said.notes[0] == "a run seems to be at work: what it has begun and what it shares is left alone"
    assert everything(storage) == before


def test_taking_over_ends_the_right_of_a_run_that_is_alive_after_all() -> None:
    storage = PosixStorage("/run", SimulatedDisk())
    fence = start(storage)
    save(storage, fence, 10)
    write_all(storage, intent_of(fence, 20), ranks=[0])
    done = collected(storage, ONE, Mandate("ann", NOON, dry_run=False, take_over=True))
    assert [one.id for one in done.deleted] == ["0000000020-e00001"]
    with pytest.raises(SupersededError):
        save(storage, fence, 30)
    assert there(storage) == [10, 30]
    again = collected(storage, ONE, Mandate("ann", NOON, dry_run=False))
    assert again.completed == ["0000000030-e00001"], "the fence by hand is nobody's work, and what is whole is kept"


def test_no_fence_is_taken_where_nothing_depends_on_it(storage: Storage) -> None:
    fence = start(storage)
    for step in (10, 20):
        save(storage, fence, step)
    collected(storage, ONE, GO)
    assert current_epoch(storage) == 1
    assert there(storage) == [20]
    save(storage, fence, 30)


def test_without_a_rule_only_what_was_never_completed_goes(storage: Storage) -> None:
    left_behind(storage)
    assert [one.id for one in collected(storage, ALL, GO).deleted] == ["0000000050-e00001"]
    assert there(storage) == [10, 20, 30, 40]


def test_a_second_time_there_is_nothing_to_do(storage: Storage) -> None:
    left_behind(storage)
    collected(storage, ONE, GO)
    before = everything(storage)
    again = collected(storage, ONE, GO)
    assert (again.deleted, again.completed, again.blobs, again.bytes) == ([], [], 0, 0)
    assert everything(storage) == before


def test_a_full_disk_is_cleared_in_two_goes() -> None:
    disk = SimulatedDisk()
    storage = left_behind(PosixStorage("/run", disk))
    disk.capacity = disk.used
    said = collected(storage, ONE, GO)
    assert "the storage was full" in said.notes[0]
    assert there(storage) == [30, 40, 50]
    assert "full" not in str(collected(storage, ONE, GO).notes)
    assert there(storage) == [40]
    assert find_newest(storage, deep=True).rejected == ()


def test_an_attempt_that_begins_meanwhile_ends_it() -> None:
    at, stopped = 0, 0
    while True:
        storage = left_behind(PosixStorage("/run", SimulatedDisk()))
        schedule = Schedule(at=at, kind="delay", delay=partial(begin, storage, "new", EVENING))
        try:
            collected(FaultingStorage(storage, schedule), ONE, GO)
        except (InUseError, SupersededError):
            stopped += 1
        if not schedule.fired:
            break
        found = find_newest(storage, deep=True)
        assert (found.rejected, found.manifest and found.manifest.id.step) == ((), 40), schedule.names[at]
        at += 7
    assert stopped > 3


def test_a_crash_at_any_moment_loses_nothing_that_must_stay() -> None:
    at = 0
    while True:
        storage = left_behind(PosixStorage("/run", SimulatedDisk()))
        pin(storage, CheckpointId(1, 10), "ann", "", NOON)
        schedule = Schedule(at=at)
        with suppress(Crash):
            collected(FaultingStorage(storage, schedule), ONE, GO)
        if not schedule.fired:
            break
        where = schedule.names[at]
        found = find_newest(storage, deep=True)
        assert found.rejected == (), where
        assert found.manifest is not None, where
        assert found.manifest.id.step in (30, 40), where
        assert listed(storage)[CheckpointId(1, 10)].is_settled, where
        collected(storage, ONE, GO)
        assert there(storage) == [10, 40], where
        at += 3
    assert at > 100


rules = st.builds(
    Retention,
    keep_last=st.none() | st.integers(1, 3),
    keep_every=st.none() | st.sampled_from([20, 30]),
    keep_best=st.none() | st.builds(Best, metric=st.just("loss"), mode=st.sampled_from(["min", "max"])),
    quota_bytes=st.none() | st.integers(1, 200_000),
)
STEPS = [10, 20, 30, 40, 50]


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(STEPS), min_size=1, unique=True),
    st.sets(st.sampled_from(STEPS)),
    st.sets(st.sampled_from(STEPS)),
    st.booleans(),
    rules,
)
def test_whatever_the_rules_the_newest_whole_one_and_pinned_ones_stay(
    steps: list[int], pinned: set[int], damaged: set[int], unfinished: bool, policy: Retention
) -> None:
    storage, fence = saved_run(steps, pinned, damaged)
    if unfinished:
        write_all(storage, intent_of(fence, 5), ranks=[0])
    before = find_newest(storage).manifest
    collected(storage, policy, GO)
    after = find_newest(storage, deep=True).manifest
    assert (after and after.id) == (before and before.id)
    assert {CheckpointId(1, step) for step in pinned & set(steps)} <= set(listed(storage))
    assert CheckpointId(1, 5) not in listed(storage)


def test_an_unfinished_one_whose_receipts_are_all_there_becomes_the_newest_and_stays() -> None:
    storage = PosixStorage("/run", SimulatedDisk())
    fence = start(storage)
    save(storage, fence, 10)
    write_all(storage, intent_of(fence, 20))
    done = collected(storage, ONE, GO)
    assert done.completed == ["0000000020-e00001"]
    found = find_newest(storage, deep=True).manifest
    assert found is not None
    assert found.id == CheckpointId(1, 20)
