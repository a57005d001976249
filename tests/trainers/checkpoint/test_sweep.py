"""Sweeping deletes what may go, in an order in which nothing is ever half a checkpoint."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.looking import listing_of
from finetune_trainers.checkpoint.commit import abandon, begin
from finetune_trainers.checkpoint.fence import SupersededError
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.manifest import DataState
from finetune_trainers.checkpoint.pins import pin, unpin
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.errors import StorageFullError
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import plan_sweep, sweep
from finetune_trainers.checkpoint.write import announce
from tests.trainers.checkpoint.faulting import Crash, FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import SMALL, intent_of, save, start, write_all
from tests.trainers.checkpoint.synthetic import NOON
from tests.trainers.checkpoint.test_crashes import blob, put

ONE = Retention(keep_last=1)


def there(storage: Storage) -> list[int]:
    return sorted(checkpoint.step for checkpoint in listed(storage))


def test_what_no_rule_keeps_is_gone_without_a_trace(storage: Storage) -> None:
    fence = start(storage)
    for step in (10, 20, 30):
        save(storage, fence, step)
    swept = sweep(storage, Retention(keep_last=2), fence)
    assert swept.deleted == (CheckpointId(1, 10),)
    assert swept.num_bytes > 8000
    assert there(storage) == [20, 30]
    assert list(storage.list("ckpt/0000000010-e00001/")) == []


def test_a_plan_changes_nothing(storage: Storage) -> None:
    fence = start(storage)
    save(storage, fence, 10)
    save(storage, fence, 20)
    before = sorted((stored.name, stored.bytes) for stored in storage.list(""))
    plan = plan_sweep(storage, ONE, fence)
    assert [(verdict.id.step, verdict.keep) for verdict in plan.verdicts] == [(20, True), (10, False)]
    assert sorted((stored.name, stored.bytes) for stored in storage.list("")) == before


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(storage: Storage) -> None:
    fence = start(storage)
    first = save(storage, fence, 10).id
    save(storage, fence, 20)
    pin(storage, first, "ann", "for the paper", NOON)
    assert sweep(storage, ONE, fence).deleted == ()
    unpin(storage, first)
    assert sweep(storage, ONE, fence).deleted == (first,)


def test_the_newest_whole_one_stays_when_newer_ones_are_damaged(storage: Storage) -> None:
    fence = start(storage)
    for step in (10, 20, 30):
        save(storage, fence, step)
    storage.delete([layout.shard(CheckpointId(1, 30), 1)])
    storage.replace(layout.manifest(CheckpointId(1, 20)), b"{}")
    sweep(storage, ONE, fence)
    found = find_newest(storage, deep=True).manifest
    assert found is not None
    assert found.id.step == 10
    assert there(storage) == [10, 20, 30], "damaged ones are for a person to look at"
    save(storage, fence, 40)
    sweep(storage, ONE, fence)
    assert there(storage) == [40]


def test_nothing_is_deleted_when_nothing_is_whole(storage: Storage) -> None:
    fence = start(storage)
    for step in (10, 20):
        save(storage, fence, step)
        storage.delete([layout.shard(CheckpointId(1, step), 0)])
    assert sweep(storage, ONE, fence).deleted == ()


def test_abandoned_folders_go_and_open_ones_stay(storage: Storage) -> None:
    fence = start(storage)
    save(storage, fence, 10)
    write_all(storage, intent_of(fence, 20))
    abandon(storage, fence, CheckpointId(1, 20), "no space")
    write_all(storage, intent_of(fence, 30), ranks=[0])
    assert sweep(storage, ONE, fence).deleted == (CheckpointId(1, 20),)
    assert there(storage) == [10, 30]


def test_what_a_dead_attempt_left_half_written_goes_with_the_next_sweep(storage: Storage) -> None:
    dead = start(storage)
    save(storage, dead, 10)
    write_all(storage, intent_of(dead, 20), ranks=[1])
    fence, _ = begin(storage, "next", NOON)
    assert sweep(storage, ONE, fence).deleted == (CheckpointId(1, 20),)


def test_on_a_full_disk_deleting_makes_room_and_an_attempt_begins() -> None:
    """Neither a tombstone nor a fence would fit."""
    disk = SimulatedDisk()
    storage = PosixStorage("/run", disk)
    fence = start(storage)
    for step in (10, 20, 30):
        save(storage, fence, step)
    write_all(storage, intent_of(fence, 40))
    abandon(storage, fence, CheckpointId(1, 40), "no space")
    disk.capacity = disk.used
    assert begin(storage, "next", NOON)[0].epoch == 2
    assert there(storage) == [10, 20, 30]
    disk.capacity = disk.used
    assert sweep(storage, Retention(keep_last=2)).deleted == (CheckpointId(1, 10),)
    assert there(storage) == [20, 30]
    assert find_newest(storage, deep=True).rejected == ()


def test_an_attempt_that_finds_a_full_disk_and_nothing_to_free_says_so() -> None:
    disk = SimulatedDisk()
    storage = PosixStorage("/run", disk)
    save(storage, start(storage), 10)
    disk.capacity = disk.used
    with pytest.raises(StorageFullError, match="no space left"):
        begin(storage, "next", NOON)
    assert there(storage) == [10]


def test_a_deletion_that_was_cut_short_is_finished(storage: Storage) -> None:
    fence = start(storage)
    for step in (10, 20):
        save(storage, fence, step)
    storage.create(layout.tombstone(CheckpointId(1, 10)), b"half")
    assert [one.is_settled for one in listed(storage).values()] == [True, False]
    assert sweep(storage, Retention(keep_last=5), fence).deleted == (CheckpointId(1, 10),)
    assert there(storage) == [20]


def test_shared_files_go_with_the_last_checkpoint_that_names_them(storage: Storage) -> None:
    fence = start(storage)
    put(storage, b"shared")
    put(storage, b"own")
    put(storage, b"coming")
    save(storage, fence, 10, blobs=(blob(b"own"), blob(b"shared")))
    save(storage, fence, 20, blobs=(blob(b"shared"),))
    announce(storage, intent_of(fence, 30, blobs=(blob(b"coming"),)))
    assert sweep(storage, Retention(keep_last=2), fence).plan.blobs == ()
    assert sweep(storage, ONE).plan.blobs == (), "only the holder of the fence knows what is about to be named"
    swept = sweep(storage, ONE, fence)
    assert swept.plan.blobs == (layout.blob(blob(b"own").digest),)
    left = {stored.name for stored in storage.list(layout.BLOBS)}
    assert left == {layout.blob(blob(content).digest) for content in (b"shared", b"coming")}


def test_no_blob_goes_while_a_manifest_cannot_be_read(storage: Storage) -> None:
    fence = start(storage)
    put(storage, b"precious")
    save(storage, fence, 10)
    damaged = save(storage, fence, 20, blobs=(blob(b"precious"),))
    storage.replace(layout.manifest(damaged.id), b"{}")
    assert sweep(storage, ONE, fence).plan.blobs == ()
    assert storage.size(layout.blob(blob(b"precious").digest)) == 8


def test_the_checkpoint_in_use_stays(storage: Storage) -> None:
    fence = start(storage)
    resumed = save(storage, fence, 10).id
    save(storage, fence, 20)
    assert sweep(storage, ONE, fence, protected=[resumed]).deleted == ()


@pytest.mark.parametrize("times", [1, 2])
def test_sweeping_again_deletes_nothing_more(storage: Storage, times: int) -> None:
    fence = start(storage)
    for step in (10, 20, 30):
        save(storage, fence, step)
    sweep(storage, ONE, fence)
    for _ in range(times):
        assert sweep(storage, ONE, fence).deleted == ()


def test_a_sweep_deletes_nothing_more_once_a_newer_attempt_has_begun() -> None:
    storage = PosixStorage("/run", SimulatedDisk())
    fence = start(storage)
    for step in (10, 20, 30):
        save(storage, fence, step)
    counting = Schedule()
    plan_sweep(FaultingStorage(storage, counting), ONE, fence)
    planned = counting.passed + 2  # sweep looks at the fence once before it plans
    late = Schedule(at=planned, kind="delay", delay=lambda: begin(storage, "new", NOON))
    with pytest.raises(SupersededError):
        sweep(FaultingStorage(storage, late), ONE, fence)
    assert late.fired
    assert there(storage) == [10, 20, 30]


def test_what_was_half_deleted_is_never_completed_again() -> None:
    """All its receipts may still be there: without the tombstone the next attempt would publish it anew."""
    at = 0
    while True:
        storage = PosixStorage("/run", SimulatedDisk())
        fence = start(storage)
        for step in (10, 20):
            save(storage, fence, step)
        schedule = Schedule(at=at)
        with suppress(Crash):
            sweep(FaultingStorage(storage, schedule), ONE, fence)
        if not schedule.fired:
            break
        _, settled = begin(storage, "next", NOON)
        assert settled.completed == (), schedule.names[at]
        assert there(storage) in ([10, 20], [20]), schedule.names[at]
        at += 1
    assert at > 30


OTHERS: dict[str, dict[str, Any]] = {
    "a job that was deleted and made again": {"job": "uid-2"},
    "other data": {"data": DataState(seed=7, epoch=0, cursor=80, digest="2" * 64)},
    "another global batch": {"global_batch": 2},
    "other parameters": {"tensors": SMALL[:1]},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_the_newest_of_another_training_stays_however_much_this_one_saves(
    storage: Storage, change: dict[str, Any]
) -> None:
    fence = start(storage)
    for step in (400, 500):
        save(storage, fence, step)
    fence = start(storage)
    for step in (10, 20, 30):
        save(storage, fence, step, **change)
        sweep(storage, ONE, fence)
        assert there(storage) == [step, 500]
    row = listing_of(storage, ONE, NOON).checkpoints[-1]
    assert row.keep
    assert row.reasons[-1] == "of another training"
    assert find_newest(storage, deep=True).rejected == ()
    assert sweep(storage, Retention(keep_last=1, drop_others=True), fence).deleted == (CheckpointId(1, 500),)


def test_an_attempt_of_the_same_training_replaces_what_earlier_ones_saved(storage: Storage) -> None:
    fence = start(storage)
    save(storage, fence, 10)
    fence = start(storage)
    save(storage, fence, 20, world=3, attempt=2, writer={"torch": "9"})
    assert sweep(storage, ONE, fence).deleted == (CheckpointId(1, 10),)


def test_an_import_counts_with_the_training_that_goes_on_from_it(storage: Storage) -> None:
    fence = start(storage)
    save(storage, fence, 10, data=None)
    fence = start(storage)
    save(storage, fence, 20)
    assert sweep(storage, ONE, fence).deleted == (CheckpointId(1, 10),)


def test_an_import_does_not_make_one_training_of_two(storage: Storage) -> None:
    fence = start(storage)
    save(storage, fence, 10)
    fence = start(storage)
    save(storage, fence, 20, **OTHERS["other data"])
    fence = start(storage)
    save(storage, fence, 30, data=None)
    assert sweep(storage, ONE, fence).deleted == (CheckpointId(2, 20),)


def test_a_damaged_manifest_does_not_hide_whose_checkpoint_it_was(storage: Storage) -> None:
    fence = start(storage)
    damaged = save(storage, fence, 500)
    storage.replace(layout.manifest(damaged.id), b"{}")
    fence = start(storage)
    save(storage, fence, 10, job="uid-2")
    assert sweep(storage, ONE, fence).deleted == (), "a person may mend it"
