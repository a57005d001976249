"""The newest whole checkpoint is found; damaged ones are named; what cannot be looked at is not called damaged."""

from __future__ import annotations

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.storage.errors import StorageUnavailableError
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import save, start


def test_an_empty_root_has_none(storage: Storage) -> None:
    search = find_newest(storage)
    assert (search.manifest, search.rejected) == (None, ())


@pytest.mark.parametrize("head", [b"", b"garbage", b'{"checkpoint":"0000000099-e00009"}'])
def test_the_pointer_is_never_trusted(storage: Storage, head: bytes) -> None:
    manifest = save(storage, start(storage), 10)
    assert manifest.bytes > 0
    storage.replace(layout.HEAD, head)
    assert find_newest(storage).manifest == manifest
    storage.delete([layout.HEAD])
    assert find_newest(storage).manifest == manifest


def test_a_deleted_manifest_makes_the_next_older_the_newest(storage: Storage) -> None:
    fence = start(storage)
    older, newer = save(storage, fence, 10), save(storage, fence, 20)
    storage.delete([layout.manifest(newer.id)])
    assert find_newest(storage).manifest == older


def test_each_damaged_one_is_named_and_passed_over(storage: Storage) -> None:
    fence = start(storage)
    saved = [save(storage, fence, step) for step in (10, 20, 30)]
    storage.delete([layout.shard(saved[2].id, 0)])
    storage.replace(layout.receipt(saved[1].id, 1), b"{}")
    search = find_newest(storage)
    assert search.manifest == saved[0]
    assert [rejected.checkpoint.step for rejected in search.rejected] == [30, 20]
    assert "ckpt/0000000030-e00001/shard-00000-000.safetensors: is missing" in str(search.rejected[0])
    assert "ckpt/0000000020-e00001/receipt-00001.json: is not in canonical form" not in str(search.rejected[1])
    assert "receipt-00001.json: does not have the content that its digest was taken of" in str(search.rejected[1])


def test_a_checkpoint_in_the_wrong_folder_is_rejected(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10)
    for stored in list(storage.list(layout.folder(manifest.id))):
        other = stored.name.replace(str(manifest.id), str(CheckpointId(1, 99)))
        storage.create(other, storage.read(stored.name))
    search = find_newest(storage)
    assert search.manifest == manifest
    assert f"is the manifest of {manifest.id}" in str(search.rejected[0])


def test_foreign_files_in_the_root_are_ignored(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10)
    for name in ("ckpt/README.txt", "ckpt/latest/MANIFEST.json", "ckpt/0000000099-e9/MANIFEST.json", "notes"):
        storage.create(name, b"?")
    assert find_newest(storage).manifest == manifest


def test_a_storage_that_is_away_rejects_nothing() -> None:
    inner = PosixStorage("/run", SimulatedDisk())
    save(inner, start(inner), 10)
    counting = Schedule()
    find_newest(FaultingStorage(inner, counting), deep=True)
    for at in range(counting.passed):
        with pytest.raises(StorageUnavailableError):
            find_newest(FaultingStorage(inner, Schedule(at=at, kind="unavailable")), deep=True)


def test_a_checkpoint_that_is_being_deleted_is_none(storage: Storage) -> None:
    fence = start(storage)
    older, newer = save(storage, fence, 10), save(storage, fence, 20)
    storage.create(layout.tombstone(newer.id), b"")
    search = find_newest(storage)
    assert (search.manifest, search.rejected) == (older, ())
