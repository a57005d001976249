"""Repair publishes, closes and rewrites what follows from what is there, and touches nothing that could be data."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.activity import InUseError
from finetune_trainers.checkpoint.admin.mending import repaired
from finetune_trainers.checkpoint.admin.upkeep import Mandate
from finetune_trainers.checkpoint.commit import pointer
from finetune_trainers.checkpoint.fence import current_epoch
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.pins import pin
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.trainers.checkpoint.faulting import Crash, FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, save, start, write_all
from tests.trainers.checkpoint.synthetic import NOON

EVENING = NOON + timedelta(hours=8)
GO = Mandate("ann@host", EVENING, dry_run=False)
ONLY_SAY = Mandate("ann@host", EVENING, dry_run=True)
FIRST, SECOND = CheckpointId(1, 10), CheckpointId(1, 20)


def everything(storage: Storage) -> dict[str, bytes]:
    return {stored.name: storage.read(stored.name) for stored in storage.list("")}


def data_of(storage: Storage) -> dict[str, bytes]:
    """All that no other file tells again."""
    return {name: data for name, data in everything(storage).items() if "shard-" in name or "aux-" in name}


def in_disorder(storage: Storage) -> Storage:
    """One of each: lacks its manifest, half written, pinned under a tombstone, damaged documents, damaged weights."""
    fence = start(storage)
    for step in (10, 20, 30, 40):
        save(storage, fence, step)
    pin(storage, FIRST, "ann", "", NOON)
    storage.create(layout.tombstone(FIRST), b"half")
    storage.replace(layout.manifest(SECOND), b"{}")
    storage.replace(layout.receipt(CheckpointId(1, 30), 1), b"{}")
    storage.delete([layout.intent(CheckpointId(1, 30)), layout.shard(CheckpointId(1, 40), 1)])
    write_all(storage, intent_of(fence, 50))
    write_all(storage, intent_of(fence, 60), ranks=[0])
    storage.replace(layout.HEAD, b"garbage")
    return storage


def test_everything_that_can_be_is_put_in_order(storage: Storage) -> None:
    in_disorder(storage)
    data = data_of(storage)
    done = repaired(storage, GO)
    assert done.completed == ["0000000050-e00001"]
    assert [(one.id, one.reason) for one in done.closed] == [("0000000060-e00001", "rank 1 has no receipt")]
    assert done.revived == [str(FIRST)]
    assert sorted((one.file, one.what) for one in done.mended) == [
        ("ckpt/0000000020-e00001/MANIFEST.json", "written again from intent and receipts"),
        ("ckpt/0000000030-e00001/INTENT.json", "written again from the manifest"),
        ("ckpt/0000000030-e00001/receipt-00001.json", "written again from the manifest"),
    ]
    assert done.head is not None
    assert done.head.a == "garbage"
    assert [(one.id, one.damages[0].file) for one in done.damaged] == [
        ("0000000040-e00001", "ckpt/0000000040-e00001/shard-00001-000.safetensors")
    ]
    assert data_of(storage) == data, "weights are never touched"
    search = find_newest(storage, deep=True)
    assert search.manifest is not None
    assert search.manifest.id == CheckpointId(1, 50)
    assert storage.read(layout.HEAD) == pointer(search.manifest)


def test_a_dry_run_says_the_same_and_changes_nothing(storage: Storage) -> None:
    in_disorder(storage)
    before = everything(storage)
    said = repaired(storage, ONLY_SAY)
    assert everything(storage) == before
    ours = {"dry_run": False}
    assert said.model_copy(update=ours) == repaired(storage, GO).model_copy(update=ours)


def test_a_rewritten_document_is_the_one_that_was_there(storage: Storage) -> None:
    fence = start(storage)
    save(storage, fence, 10)
    before = everything(storage)
    names = [layout.manifest(FIRST), layout.intent(FIRST), layout.receipt(FIRST, 0), layout.HEAD]
    for name in names:
        storage.replace(name, b"damaged")
        done = repaired(storage, GO)
        assert len(done.mended) + (done.head is not None) == 1, name
        assert everything(storage) == before, name


def test_where_all_is_well_nothing_is_written(storage: Storage) -> None:
    save(storage, start(storage), 10)
    before = everything(storage)
    done = repaired(storage, Mandate("ann", NOON, dry_run=False))
    assert (done.completed, done.closed, done.revived, done.mended, done.head, done.damaged) == (
        [],
        [],
        [],
        [],
        None,
        [],
    )
    assert everything(storage) == before


def test_a_second_repair_finds_nothing_but_what_cannot_be_mended(storage: Storage) -> None:
    in_disorder(storage)
    repaired(storage, GO)
    before = everything(storage)
    again = repaired(storage, GO)
    assert (again.completed, again.closed, again.revived, again.mended, again.head) == ([], [], [], [], None)
    assert [one.id for one in again.damaged] == ["0000000040-e00001"]
    assert everything(storage) == before


def test_two_documents_that_are_both_damaged_are_left_as_they_are(storage: Storage) -> None:
    save(storage, start(storage), 10)
    storage.replace(layout.manifest(FIRST), b"{}")
    storage.replace(layout.receipt(FIRST, 0), b"{}")
    before = everything(storage)
    done = repaired(storage, GO)
    assert done.mended == []
    assert [one.id for one in done.damaged] == [str(FIRST)]
    assert everything(storage) == before


def test_an_unpinned_deletion_is_not_taken_back(storage: Storage) -> None:
    save(storage, start(storage), 10)
    storage.create(layout.tombstone(FIRST), b"half")
    assert repaired(storage, GO).revived == []


def test_what_a_run_at_work_has_begun_is_left_alone(storage: Storage) -> None:
    fence = start(storage)
    write_all(storage, intent_of(fence, 10), ranks=[0])
    before = everything(storage)
    with pytest.raises(InUseError):
        repaired(storage, Mandate("ann", NOON, dry_run=False))
    assert everything(storage) == before
    done = repaired(storage, Mandate("ann", NOON, dry_run=False, take_over=True))
    assert [one.id for one in done.closed] == [str(FIRST)]
    assert current_epoch(storage) == 2


def test_where_none_is_whole_the_pointer_stays_as_it_is(storage: Storage) -> None:
    start(storage)
    storage.replace(layout.HEAD, b"garbage")
    assert repaired(storage, GO).head is None
    assert storage.read(layout.HEAD) == b"garbage"


def test_a_crash_at_any_moment_is_mended_by_repairing_again() -> None:
    reference = PosixStorage("/run", SimulatedDisk())
    in_disorder(reference)
    data, at = data_of(reference), 0
    while True:
        storage = in_disorder(PosixStorage("/run", SimulatedDisk()))
        schedule = Schedule(at=at)
        with suppress(Crash):
            repaired(FaultingStorage(storage, schedule), GO)
        if not schedule.fired:
            break
        repaired(storage, GO)
        found = find_newest(storage, deep=True).manifest
        assert found is not None, schedule.names[at]
        assert found.id == CheckpointId(1, 50), schedule.names[at]
        assert data_of(storage) == data, schedule.names[at]
        at += 5
    assert at > 100
