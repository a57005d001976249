"""A crash at every boundary of saving, publishing and sweeping: nothing torn is accepted, nothing committed is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import get_args

import pytest
from blake3 import blake3

from finetune_trainers.checkpoint.commit import IncompleteError, abandon, begin, conclude, publish
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.manifest import BlobRecord
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.errors import StorageError
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.storage.resilient import Patience, ResilientStorage
from finetune_trainers.checkpoint.sweep import sweep
from finetune_trainers.checkpoint.write import write_blob
from tests.trainers.checkpoint.faulting import Crash, FaultingStorage, Kind, Schedule, SimulatedDisk, Survival
from tests.trainers.checkpoint.saving import intent_of, original, restored, save, start, write_all
from tests.trainers.checkpoint.synthetic import NOON

KEEP_ONE = Retention(keep_last=1)
OLD, NEW = CheckpointId(1, 10), CheckpointId(2, 20)


def blob(content: bytes) -> BlobRecord:
    return BlobRecord(name="tokenizer", digest=blake3(content).hexdigest(), bytes=len(content))


def put(storage: Storage, content: bytes) -> None:
    write_blob(storage, "tokenizer", lambda: [content], len(content), blob(content).digest)


@dataclass
class Story:
    """One attempt: it saves step 20 beside an older step 10, then sweeps the older one away."""

    done: list[str] = field(default_factory=list)

    def tell(self, storage: Storage) -> None:
        fence = start(storage)
        put(storage, b"new")
        save(storage, fence, 20, blobs=(blob(b"new"),))
        self.done.append("published")
        sweep(storage, KEEP_ONE, fence)
        self.done.append("swept")


def first_chapter(storage: Storage) -> None:
    put(storage, b"old")
    save(storage, start(storage), 10, blobs=(blob(b"old"),))


def look(storage: Storage, story: Story, where: str) -> None:
    """What anybody finds afterwards: a whole checkpoint, the new one if it was published; and nothing damaged."""
    search = find_newest(storage, deep=True)
    assert search.manifest is not None, where
    assert search.rejected == (), where
    assert search.manifest.id in ((NEW,) if "published" in story.done else (OLD, NEW)), where
    assert restored(storage, search.manifest) == original(search.manifest.intent), where


def go_on(storage: Storage, where: str) -> None:
    """The next attempt saves, sweeps, and leaves one checkpoint and nothing else."""
    fence = start(storage)
    put(storage, b"new")
    save(storage, fence, 30, blobs=(blob(b"new"),))
    sweep(storage, KEEP_ONE, fence)
    storage.discard(storage.unfinished(-1.0) or ())
    third = find_newest(storage, deep=True).manifest
    assert third is not None
    assert third.id.step == 30, where
    assert list(listed(storage)) == [third.id], where
    assert [stored.name for stored in storage.list("blobs/")] == [f"blobs/{blob(b'new').digest}"], where


def disks(kind: Kind) -> Iterator[tuple[SimulatedDisk, Schedule, Story]]:
    """The story with a fault at each boundary of the disk, until there is none left."""
    at = 0
    while True:
        disk, story = SimulatedDisk(), Story()
        first_chapter(PosixStorage("/run", disk))
        schedule = disk.schedule = Schedule(at=at, kind=kind)
        with suppress(Crash, StorageError):
            story.tell(PosixStorage("/run", disk))
        yield disk, schedule, story
        if not schedule.fired:
            return
        at += 1


def test_a_crash_at_any_system_call_leaves_a_whole_checkpoint() -> None:
    """Of the process, and of the machine with all that had not reached the medium."""
    tried, survivals = 0, get_args(Survival)
    for disk, schedule, story in disks("crash"):
        for survival in survivals:
            where = f"{survival} at {schedule.names[-1]} ({tried})"
            storage = PosixStorage("/run", disk.survivor(survival))
            look(storage, story, where)
            # Going on takes long: after each kind of crash at every fourth boundary, and in turn.
            if survival == survivals[tried % len(survivals)]:
                go_on(storage, where)
        tried += 1
    assert tried > 100
    assert story.done == ["published", "swept"]


@pytest.mark.parametrize("kind", ["full", "io-error"])
def test_a_full_disk_or_a_failing_one_at_any_system_call_costs_no_checkpoint(kind: Kind) -> None:
    failed = 0
    for at, (disk, schedule, story) in enumerate(disks(kind)):
        where = f"{kind} at {schedule.names[at] if schedule.fired else 'no boundary'}"
        schedule.at = None  # the process lives on, and so does the disk
        storage = PosixStorage("/run", disk)
        failed += "swept" not in story.done
        look(storage, story, where)
        if at % 3 == 0:
            go_on(storage, where)
    assert failed > 50


def requests(kind: Kind) -> Iterator[tuple[Storage, Schedule, Story]]:
    """The story with a fault at each request to a storage, whatever its kind."""
    at = 0
    while True:
        inner, story = PosixStorage("/run", SimulatedDisk()), Story()
        first_chapter(inner)
        schedule = Schedule(at=at, kind=kind)
        with suppress(Crash, StorageError):
            story.tell(FaultingStorage(inner, schedule))
        yield inner, schedule, story
        if not schedule.fired:
            return
        at += 1


def test_a_crash_at_any_request_leaves_a_whole_checkpoint() -> None:
    tried = 0
    for storage, schedule, story in requests("crash"):
        look(storage, story, schedule.names[-1])
        if tried % 2 == 0:
            go_on(storage, schedule.names[-1])
        tried += 1
    assert tried > 100


def test_a_request_whose_answer_is_lost_is_tried_again_and_the_story_ends_well() -> None:
    """Also where the request was carried out: creating again must not look like somebody else's file."""
    at, paused = 0, 0

    def pause(seconds: float) -> None:
        nonlocal paused
        paused += 1

    while True:
        inner, story, schedule = PosixStorage("/run", SimulatedDisk()), Story(), Schedule(at, "unavailable")
        first_chapter(inner)
        story.tell(ResilientStorage(FaultingStorage(inner, schedule), Patience(), sleep=pause))
        assert story.done == ["published", "swept"]
        if not schedule.fired:
            break
        look(inner, story, schedule.names[at])
        at += 1
    assert paused == at > 100


def test_a_checkpoint_is_concluded_as_published_or_never_will_be() -> None:
    """A request fails for good, before or after it was carried out: whoever concludes knows which."""
    at, published = 0, 0
    while True:
        inner = PosixStorage("/run", SimulatedDisk())
        fence = start(inner)
        intent = intent_of(fence, 10)
        write_all(inner, intent)
        schedule = Schedule(at, "unavailable")
        try:
            conclude(FaultingStorage(inner, schedule), fence, intent.id)
            is_published = True
        except StorageError:
            is_published = False
        published += is_published and schedule.fired
        where = schedule.names[min(at, len(schedule.names) - 1)]
        assert (find_newest(inner).manifest is not None) == is_published, where
        if not is_published:
            begin(inner, "next", NOON)
            assert find_newest(inner).manifest is None, where
        if not schedule.fired:
            break
        at += 1
    assert at > 10
    assert published > 2, "after the manifest was created"


def test_an_attempt_that_failed_can_give_up_its_checkpoint_and_save_the_next_step() -> None:
    disk = SimulatedDisk()
    storage = PosixStorage("/run", disk)
    fence = start(storage)
    save(storage, fence, 10)
    disk.schedule = Schedule(at=20, kind="full")  # in mid-shard, in whatever order two threads write theirs
    with pytest.raises(StorageError):
        save(storage, fence, 20)
    assert abandon(storage, fence, CheckpointId(1, 20), "no space")
    with pytest.raises(IncompleteError):
        publish(storage, fence, CheckpointId(1, 20))
    assert save(storage, fence, 30).id == CheckpointId(1, 30)
    assert sweep(storage, Retention(keep_last=3), fence).deleted == (CheckpointId(1, 20),)
