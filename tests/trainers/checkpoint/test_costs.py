"""What a plan says will be read is what is read."""

from __future__ import annotations

import pytest

from finetune_trainers.checkpoint.admin.costs import costs_of
from finetune_trainers.checkpoint.manifest import Manifest, ParamGroup
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Requests, Storage
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import SMALL, restored, save, start

STATE_BYTES = 4 * (2 * 2800 + 3)


@pytest.fixture
def place() -> Storage:
    return PosixStorage("/run", SimulatedDisk())


@pytest.fixture
def manifest(place: Storage) -> Manifest:
    return save(place, start(place), 10, world=2, global_batch=12)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_together_the_processes_need_the_state_once(place: Storage, manifest: Manifest, world: int, stage: int) -> None:
    found = costs_of(place, manifest, world, stage, None)
    assert found.bytes_needed == sum(rank.bytes_needed for rank in found.ranks) == STATE_BYTES
    assert len(found.ranks) == world
    assert found.bytes_read >= found.bytes_needed


def test_without_zero_every_process_needs_everything(place: Storage, manifest: Manifest) -> None:
    found = costs_of(place, manifest, 3, 0, None)
    assert [rank.bytes_needed for rank in found.ranks] == [STATE_BYTES] * 3
    assert "under ZeRO 0 every process reads everything" in found.notes


@pytest.mark.parametrize("world", [1, 2, 3])
def test_it_is_what_a_restore_reads(place: Storage, manifest: Manifest, world: int) -> None:
    planned = costs_of(place, manifest, world, 3, None)
    for rank in planned.ranks:
        schedule = Schedule()
        restored(FaultingStorage(place, schedule), manifest, rank.rank, world)
        reads = [name for name in schedule.names if name.startswith("before read") and "[" in name]
        spans = [name.rpartition("[")[2].rstrip(")").split(", ") for name in reads]
        assert sum(int(end) - int(begin) for begin, end in spans) == rank.bytes_read
        assert rank.requests == len(reads), "digests that are read along are one request for each file"


def test_the_groups_of_the_optimizer_are_what_zero_2_cuts(place: Storage) -> None:
    """One group each: both are cut in two. Together in one, the border lies inside the larger."""
    fence = start(place)
    apart = (ParamGroup(name="0", tensors=("weight",)), ParamGroup(name="1", tensors=("bias",)))
    manifest = save(place, fence, 10, param_groups=apart)
    needed = [rank.bytes_needed for rank in costs_of(place, manifest, 2, 2, None).ranks]
    assert needed == [4 * (2 * 1400 + 2), 4 * (2 * 1400 + 1)]
    manifest = save(place, fence, 20, param_groups=(ParamGroup(name="0", tensors=("weight", "bias")),))
    needed = [rank.bytes_needed for rank in costs_of(place, manifest, 2, 2, None).ranks]
    assert needed == [4 * 2 * 1402, 4 * (2 * 1398 + 3)]
    assert SMALL[0].states.keys() == {"param", "exp_avg"}


def test_the_stage_is_that_of_the_save_unless_another_is_named(place: Storage, manifest: Manifest) -> None:
    assert costs_of(place, manifest, 2, None, None).zero_stage == 3


@pytest.mark.parametrize(("memory", "fits"), [(None, None), (100, False), (10**9, True)])
def test_whether_it_fits_is_said_when_memory_is_named(
    place: Storage, manifest: Manifest, memory: int | None, fits: bool | None
) -> None:
    found = costs_of(place, manifest, 2, 3, memory)
    assert found.fits is fits
    assert found.memory_bytes == max(rank.bytes_needed for rank in found.ranks), "a disk fills that and no more"


def test_requests_to_a_bucket_take_memory_beside_what_they_fill(
    place: Storage, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PosixStorage, "requests", Requests(longest=4096, at_once=2, buffered=True))
    found = costs_of(place, manifest, 1, 3, None)
    assert found.memory_bytes == found.bytes_needed + 2 * 4096


def test_a_batch_that_cannot_be_shared_is_said(place: Storage, manifest: Manifest) -> None:
    assert (
        "global batch of 12 sequences cannot be shared by 5 processes" in costs_of(place, manifest, 5, 3, None).notes[0]
    )
    assert costs_of(place, manifest, 4, 3, None).notes == []


def test_more_processes_than_elements_leave_some_with_nothing(place: Storage, manifest: Manifest) -> None:
    found = costs_of(place, manifest, 4000, 3, None)
    assert found.ranks[-1].bytes_needed == 0
    assert found.bytes_needed == STATE_BYTES
