"""Verification by hand names every damage it can: the file, and the elements of the tensor."""

from __future__ import annotations

from functools import partial

import pytest

from finetune_api.answers import Step
from finetune_api.checkpoints import Damages
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.verifying import verification
from finetune_trainers.checkpoint.commit import abandon
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import sweep
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, save, start, write_all
from tests.trainers.checkpoint.test_crashes import blob, put

FIRST, SECOND = CheckpointId(1, 10), CheckpointId(1, 20)


@pytest.fixture
def run() -> Storage:
    storage = PosixStorage("/run", SimulatedDisk())
    fence = start(storage)
    put(storage, b"tokenizer" * 50)
    save(storage, fence, 10, blobs=(blob(b"tokenizer" * 50),))
    save(storage, fence, 20)
    return storage


def flip(storage: Storage, name: str, at: int) -> None:
    data = bytearray(storage.read(name))
    data[at] ^= 1
    storage.replace(name, bytes(data))


def looked_at(storage: Storage, *asked: CheckpointId, deep: bool) -> list[Damages]:
    return verification(storage, asked, deep, lambda flow: None).checkpoints


def test_a_quick_look_reads_no_weights(run: Storage) -> None:
    flip(run, layout.shard(FIRST, 0), 5000)
    schedule = Schedule()
    found = verification(FaultingStorage(run, schedule), [FIRST, SECOND], False, lambda flow: None)
    assert found.whole
    assert [name for name in schedule.names if "safetensors" in name] == []


@pytest.mark.parametrize("deep", [False, True])
def test_what_the_run_deletes_meanwhile_is_told_and_is_no_damage(deep: bool) -> None:
    """At each request in turn the run sweeps."""
    at, told = 0, []
    while True:
        storage = PosixStorage("/run", SimulatedDisk())
        fence = start(storage)
        put(storage, b"tokenizer")
        save(storage, fence, 10, blobs=(blob(b"tokenizer"),))
        save(storage, fence, 20)
        schedule = Schedule(at=at, kind="delay", delay=partial(sweep, storage, Retention(keep_last=1), fence))
        found = verification(FaultingStorage(storage, schedule), [SECOND, FIRST], deep, lambda flow: None)
        assert found.whole, (schedule.names, found)
        told.append([one.id for one in found.checkpoints if one.id == str(FIRST)] + found.deleted)
        if not schedule.fired:
            break
        at += 1
    assert told == [[str(FIRST)]] * (at + 1)
    assert at > 3


def test_a_checkpoint_that_is_half_deleted_is_no_damage(run: Storage) -> None:
    run.create(layout.tombstone(FIRST), b"{}")
    run.delete([layout.manifest(FIRST), layout.shard(FIRST, 0)])
    found = verification(run, [SECOND, FIRST], False, lambda flow: None)
    assert (found.whole, found.deleted) == (True, [str(FIRST)])


def test_a_deep_look_names_file_and_elements(run: Storage) -> None:
    """The data of a shard begins at byte 4096, elements of 4 bytes in chunks of 4096."""
    flip(run, layout.shard(FIRST, 0), 4096 + 4096 + 7)
    (first,) = looked_at(run, FIRST, deep=True)
    (damage,) = first.damages
    assert damage.file == layout.shard(FIRST, 0)
    assert (damage.role, damage.tensor, damage.state) == ("model", "weight", "param")
    assert damage.start == 1024
    assert damage.end is not None
    assert 1024 < damage.end <= 2048


def test_all_damages_are_named_at_once(run: Storage) -> None:
    run.delete([layout.shard(FIRST, 1)])
    flip(run, layout.shard(FIRST, 0), 4200)
    flip(run, layout.receipt(FIRST, 1), 30)
    flip(run, layout.blob(blob(b"tokenizer" * 50).digest), 3)
    (first,) = looked_at(run, FIRST, deep=True)
    assert not first.whole
    assert {damage.file for damage in first.damages} == {
        layout.shard(FIRST, 0),
        layout.shard(FIRST, 1),
        layout.receipt(FIRST, 1),
        layout.blob(blob(b"tokenizer" * 50).digest),
    }
    assert len(first.damages) == 4, "nothing is told twice"


def test_a_manifest_that_cannot_be_read_is_the_damage(run: Storage) -> None:
    flip(run, layout.manifest(FIRST), 100)
    (first,) = looked_at(run, FIRST, deep=True)
    assert [damage.file for damage in first.damages] == [layout.manifest(FIRST)]


def test_one_damaged_among_whole_ones_makes_the_verdict(run: Storage) -> None:
    run.delete([layout.shard(FIRST, 0)])
    found = verification(run, [SECOND, FIRST], False, lambda flow: None)
    assert not found.whole
    assert [(one.id, one.whole) for one in found.checkpoints] == [(str(SECOND), True), (str(FIRST), False)]


def test_what_was_given_up_is_left_out(run: Storage) -> None:
    fence = start(run)
    write_all(run, intent_of(fence, 30), ranks=[0])
    abandon(run, fence, CheckpointId(2, 30), "no space")
    assert looked_at(run, CheckpointId(2, 30), deep=True) == []


def test_the_progress_ends_at_the_total_which_is_every_byte(run: Storage) -> None:
    flows: list[Step] = []
    found = verification(run, [SECOND, FIRST], True, flows.append)
    done = [flow.done for flow in flows]
    assert done == sorted(done)
    assert done[-1] == flows[-1].total == found.bytes_read
    assert flows[-1].total > 70_000
