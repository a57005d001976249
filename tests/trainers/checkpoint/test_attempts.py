"""Attempts that overlap: an old one that wakes up never publishes over a newer one, wherever it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.commit import IncompleteError, Settled, abandon, begin, publish
from finetune_trainers.checkpoint.fence import SupersededError, current_epoch, demand_fence
from finetune_trainers.checkpoint.find import find_newest, read_manifest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.errors import StorageConflictError
from finetune_trainers.checkpoint.storage.opening import refuses_to_overwrite
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import sweep
from finetune_trainers.checkpoint.write import announce
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, original, restored, save, start, write_all, write_one
from tests.trainers.checkpoint.synthetic import NOON


def newest(storage: Storage) -> CheckpointId | None:
    found = find_newest(storage, deep=True)
    assert found.rejected == ()
    return found.manifest.id if found.manifest else None


def test_every_attempt_has_a_number_of_its_own(storage: Storage) -> None:
    assert current_epoch(storage) == 0
    first, second = start(storage), start(storage)
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.token != second.token
    demand_fence(storage, second)
    with pytest.raises(SupersededError, match="attempt 1 of the run was superseded by attempt 2"):
        demand_fence(storage, first)


def test_a_checkpoint_is_there_when_its_manifest_is(storage: Storage) -> None:
    fence = start(storage)
    intent = intent_of(fence, 10)
    write_all(storage, intent)
    assert newest(storage) is None
    manifest = publish(storage, fence, intent.id)
    assert newest(storage) == manifest.id == CheckpointId(1, 10)
    assert restored(storage, manifest) == original(intent)
    assert publish(storage, fence, intent.id) == manifest, "publishing again tells that it is done"


def test_publishing_waits_for_every_receipt(storage: Storage) -> None:
    fence = start(storage)
    intent = intent_of(fence, 10, world=3)
    write_all(storage, intent, ranks=[0, 2])
    with pytest.raises(IncompleteError, match="rank 1 has no receipt"):
        publish(storage, fence, intent.id)
    write_one(storage, intent, 1)
    publish(storage, fence, intent.id)
    assert newest(storage) == intent.id


def test_publishing_looks_for_the_files_that_receipts_promise(storage: Storage) -> None:
    fence = start(storage)
    intent = intent_of(fence, 10)
    write_all(storage, intent)
    storage.delete([layout.shard(intent.id, 1)])
    with pytest.raises(IncompleteError, match=r"shard-00001-000\.safetensors is missing"):
        publish(storage, fence, intent.id)


def test_a_step_is_saved_once_in_an_attempt(storage: Storage) -> None:
    fence = start(storage)
    save(storage, fence, 10)
    with pytest.raises(StorageConflictError):
        announce(storage, intent_of(fence, 10, created=NOON + timedelta(seconds=1)))


def test_an_old_attempt_cannot_publish(storage: Storage) -> None:
    old = start(storage)
    write_all(storage, intent_of(old, 10), ranks=[0])
    new, settled = begin(storage, "new", NOON)
    assert settled == Settled(completed=(), closed=(CheckpointId(1, 10),))
    save(storage, new, 5)
    write_one(storage, intent_of(old, 10), 1)
    with pytest.raises(SupersededError):
        publish(storage, old, CheckpointId(1, 10))
    with pytest.raises(SupersededError):
        save(storage, old, 20)
    assert newest(storage) == CheckpointId(2, 5), "what the later attempt saved counts, though its step is lower"


def test_an_old_attempt_is_told_who_closed_its_checkpoint(storage: Storage) -> None:
    fence = start(storage)
    write_all(storage, intent_of(fence, 10))
    assert abandon(storage, fence, CheckpointId(1, 10), "the disk was full")
    assert abandon(storage, fence, CheckpointId(1, 10), "again")
    with pytest.raises(SupersededError, match=r"attempt 1 has closed it \(the disk was full\)"):
        publish(storage, fence, CheckpointId(1, 10))


def test_a_published_checkpoint_cannot_be_abandoned(storage: Storage) -> None:
    fence = start(storage)
    checkpoint = save(storage, fence, 10).id
    assert not abandon(storage, fence, checkpoint, "too late")
    assert newest(storage) == checkpoint


def test_the_next_attempt_completes_what_only_lacks_its_manifest(storage: Storage) -> None:
    dead = start(storage)
    save(storage, dead, 10)
    intent = intent_of(dead, 20)
    write_all(storage, intent)
    _, settled = begin(storage, "next", NOON + timedelta(hours=5))
    assert settled.completed == (intent.id,)
    found = find_newest(storage, deep=True).manifest
    assert found is not None
    assert found.intent == intent
    assert publish_is_refused(storage, dead, intent.id)


def publish_is_refused(storage: Storage, fence: object, checkpoint: CheckpointId) -> bool:
    with suppress(SupersededError):
        publish(storage, fence, checkpoint)  # type: ignore[arg-type]
        return False
    return True


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_clocks_that_differ_by_an_hour_change_nothing(storage: Storage, hours: int) -> None:
    old, _ = begin(storage, "old", NOON)
    save(storage, old, 10)
    new, _ = begin(storage, "new", NOON + timedelta(hours=hours))
    manifest = save(storage, new, 20, created=NOON + timedelta(hours=hours))
    assert newest(storage) == manifest.id
    assert sweep(storage, Retention(keep_last=1), new).deleted == (CheckpointId(1, 10),)
    with pytest.raises(SupersededError):
        sweep(storage, Retention(keep_last=1), old)


@pytest.mark.parametrize("world", [2, 3])
def test_an_attempt_that_sleeps_at_any_moment_never_publishes_under_a_newer_one(world: int) -> None:
    """At each request of an old attempt in turn, a new one begins, of as many workers or resized to more; it resumes,
    saves and sweeps; then the old goes on."""
    at = 0
    while True:
        storage = PosixStorage("/run", SimulatedDisk())
        seen: list[set[CheckpointId]] = []
        schedule = Schedule(at=at, kind="delay", delay=new_attempt(storage, seen, world))
        slow = FaultingStorage(storage, schedule)
        with suppress(SupersededError, IncompleteError, StorageConflictError):
            old = start(slow)
            save(slow, old, 10)
            save(slow, old, 20)
            sweep(slow, Retention(keep_last=1), old)
        if not schedule.fired:
            break
        where = schedule.names[at]
        after = {manifest.id for manifest in committed(storage)}
        later = {checkpoint for checkpoint in after if checkpoint not in seen[0]}
        # The old attempt may have been the later of the two to take a fence: then it is the newer one.
        allowed = max(checkpoint.epoch for checkpoint in after)
        assert {checkpoint.epoch for checkpoint in later} <= {allowed}, where
        found = find_newest(storage, deep=True)
        assert found.rejected == (), where
        assert found.manifest is not None
        assert restored(storage, found.manifest) == original(found.manifest.intent), where
        at += 1
    assert at > 100


def new_attempt(storage: Storage, seen: list[set[CheckpointId]], world: int) -> Callable[[], None]:
    def run() -> None:
        fence = start(storage)
        seen.append({manifest.id for manifest in committed(storage)})
        if (resumed := find_newest(storage).manifest) is not None:
            for rank in range(world):
                assert restored(storage, resumed, rank, world) == original(resumed.intent, rank, world)
        save(storage, fence, 15, world)
        seen[0].add(CheckpointId(fence.epoch, 15))

    return run


def committed(storage: Storage) -> list[Manifest]:
    found = [read_manifest(storage, one.checkpoint) for one in listed(storage).values() if one.is_settled]
    return [manifest for manifest in found if isinstance(manifest, Manifest)]


def test_two_attempts_that_start_at_once_have_different_numbers(storage: Storage) -> None:
    with ThreadPoolExecutor(6) as pool:
        fences = list(pool.map(lambda _: start(storage), range(6)))
    assert sorted(fence.epoch for fence in fences) == [1, 2, 3, 4, 5, 6]
    last = max(fences, key=lambda fence: fence.epoch)
    demand_fence(storage, last)


class Careless:
    """A store that speaks like S3 and ignores the conditions of a put."""

    def __init__(self, inner: PosixStorage) -> None:
        self._inner = inner

    exclusive = False

    def create(self, name: str, data: bytes) -> None:
        self._inner.replace(name, data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def test_where_creating_is_not_exclusive_the_fence_and_the_order_of_attempts_still_hold() -> None:
    storage: Storage = Careless(PosixStorage("/run", SimulatedDisk()))  # type: ignore[assignment]
    assert not refuses_to_overwrite(storage), "it is found out by trying"
    old = start(storage)
    write_all(storage, intent_of(old, 10), ranks=[0])
    new, settled = begin(storage, "new", NOON)
    assert settled == Settled((), ()), "closing could replace a manifest that is published at this moment"
    save(storage, new, 5)
    write_one(storage, intent_of(old, 10), 1)
    with pytest.raises(SupersededError):
        publish(storage, old, CheckpointId(1, 10))
    assert newest(storage) == CheckpointId(2, 5)
    assert sweep(storage, Retention(), new).deleted == (CheckpointId(1, 10),)
    storage.replace(layout.fence(2), b"somebody else's")
    with pytest.raises(SupersededError, match="another attempt has taken the number 2"):
        demand_fence(storage, new)
