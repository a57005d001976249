"""A storage whose changes are only remembered: it looks changed, and what is below it is not."""

from __future__ import annotations

import pytest

from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.errors import StorageConflictError, StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.overlay import OverlayStorage
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage, Stored
from finetune_trainers.checkpoint.sweep import sweep
from tests.trainers.checkpoint.faulting import SimulatedDisk
from tests.trainers.checkpoint.saving import save, start


def contents(storage: Storage) -> dict[str, bytes]:
    return {stored.name: storage.read(stored.name) for stored in storage.list("")}


def test_changes_are_seen_through_it_and_nowhere_else(storage: Storage) -> None:
    storage.create("old", b"1")
    storage.create("gone", b"2")
    before = contents(storage)
    overlay = OverlayStorage(storage)
    overlay.create("new", b"3")
    overlay.replace("old", b"44")
    overlay.write("large", lambda: [b"ab", memoryview(b"cd")], 4)
    overlay.delete(["gone", "never"])
    assert contents(overlay) == {"old": b"44", "new": b"3", "large": b"abcd"}
    assert [overlay.size(name) for name in ("old", "new", "gone", "never")] == [2, 1, None, None]
    assert overlay.read_range("large", 1, 3) == b"bc"
    assert contents(storage) == before
    assert (overlay.uri, overlay.exclusive) == (storage.uri, storage.exclusive)


def test_it_refuses_what_a_storage_refuses(storage: Storage) -> None:
    storage.create("there", b"1")
    overlay = OverlayStorage(storage)
    with pytest.raises(StorageConflictError):
        overlay.create("there", b"2")
    overlay.delete(["there"])
    for read in (overlay.read, lambda name: overlay.read_range(name, 0, 1)):
        with pytest.raises(StorageMissingError):
            read("there")
    overlay.create("there", b"2")
    with pytest.raises(StorageTornError, match="ends at 1"):
        overlay.read_range("there", 0, 9)
    with pytest.raises(StorageConflictError):
        overlay.create("there", b"3")


def test_a_listing_is_of_the_prefix(storage: Storage) -> None:
    storage.create("a/1", b"")
    overlay = OverlayStorage(storage)
    overlay.create("a/2", b"x")
    overlay.create("b/3", b"")
    assert sorted(overlay.list("a/"), key=lambda stored: stored.name) == [Stored("a/1", 0), Stored("a/2", 1)]


def test_the_whole_protocol_runs_on_it() -> None:
    below = PosixStorage("/run", SimulatedDisk())
    overlay = OverlayStorage(below)
    fence = start(overlay)
    for step in (10, 20):
        save(overlay, fence, step)
    sweep(overlay, Retention(keep_last=1), fence)
    found = find_newest(overlay, deep=True).manifest
    assert found is not None
    assert found.id.step == 20
    assert list(below.list("")) == []
