"""A folder as a storage: what a crash leaves is not seen, errors are told by kind, and names stay inside."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from finetune_trainers.checkpoint.storage.disk import OsDisk
from finetune_trainers.checkpoint.storage.errors import (
    StorageConflictError,
    StorageDeniedError,
    StorageFullError,
    StorageTornError,
    StorageUnavailableError,
    from_os_error,
)
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from tests.trainers.checkpoint.faulting import Schedule, SimulatedDisk


def test_unfinished_files_are_not_listed_and_are_swept_when_they_are_old(tmp_path: Path) -> None:
    storage = PosixStorage(str(tmp_path))
    storage.create("a/whole", b"1")
    old, young = tmp_path / "a/.x.1234.unfinished", tmp_path / "a/.y.1234.unfinished"
    old.write_bytes(b"")
    young.write_bytes(b"")
    os.utime(old, (0, 0))
    assert [stored.name for stored in storage.list("")] == ["a/whole"]
    assert storage.unfinished(3600) == ["a/.x.1234.unfinished"]
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"whole", old.name, young.name}, "it is only told"
    storage.discard(storage.unfinished(3600))
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"whole", young.name}


def test_a_disk_that_gives_less_than_it_was_asked_for_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal or a network may make it; read(2) promises no more than one byte."""
    preadv, data = os.preadv, bytes(range(200))
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: preadv(file, [parts[0][:7]], at))
    (tmp_path / "file").write_bytes(data)
    parts = [memoryview(bytearray(size)) for size in (20, 0, 3, 100, 77)]
    assert OsDisk().read_into(str(tmp_path / "file"), 0, parts) == 200
    assert b"".join(parts) == data


def test_a_pruned_folder_is_gone_with_what_was_unfinished_in_it(tmp_path: Path) -> None:
    storage = PosixStorage(str(tmp_path))
    storage.create("a/x", b"1")
    (tmp_path / "a/.x.1234.unfinished").write_bytes(b"")
    storage.prune("a/")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["x"], "a folder with files stays"
    storage.delete(["a/x"])
    storage.prune("a/")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", ""])
def test_a_name_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageDeniedError, match="is not the name of a file in a storage"):
        PosixStorage(str(tmp_path)).create(name, b"")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EACCES, StorageDeniedError),
        (errno.EROFS, StorageDeniedError),
        (errno.EEXIST, StorageConflictError),
        (errno.ESTALE, StorageUnavailableError),
        (errno.EIO, StorageUnavailableError),
        (None, StorageUnavailableError),
    ],
)
def test_errors_of_the_system_are_told_by_kind_and_file(number: int | None, kind: type[Exception]) -> None:
    error = from_os_error(OSError(number, "said the system") if number else OSError("said the system"), "a/b")
    assert type(error) is kind
    assert error.message == "a/b: said the system"


def test_a_failed_fsync_is_final() -> None:
    """The kernel forgets pages that it could not write: a second fsync would succeed and mean nothing."""
    disk = SimulatedDisk()
    PosixStorage("/run", disk).create("a", b"1")
    disk.schedule = Schedule()
    PosixStorage("/run", disk).create("b", b"1")
    at = disk.schedule.names.index("before fsync")
    disk.schedule = Schedule(at=at, kind="io-error")
    with pytest.raises(StorageTornError, match="fsync"):
        PosixStorage("/run", disk).create("c", b"1")
    disk.schedule = Schedule()
    assert [stored.name for stored in PosixStorage("/run", disk).list("")] == ["a", "b"]


def test_a_long_file_is_on_its_way_to_the_disk_before_it_is_synced() -> None:
    """So that its end does not wait for all of it."""

    class Watched(SimulatedDisk):
        pushed: list[tuple[int, int]] = []  # noqa: RUF012

        def push(self, file: int, start: int, size: int) -> None:
            self.pushed.append((start, start + size))

    disk, size = Watched(), 3 << 20
    PosixStorage("/run", disk).write("x", lambda: [bytes(size)] * 7, 7 * size)
    assert disk.pushed == [(0, 3 * size), (3 * size, 6 * size)]
    assert disk.survivor("names-only").entry("/run/x").bytes == 7 * size


def test_a_file_larger_than_the_free_space_is_refused_before_it_is_written(tmp_path: Path) -> None:
    def parts() -> list[bytes]:
        raise AssertionError("it is not even asked for")

    storage = PosixStorage(str(tmp_path))
    with pytest.raises(StorageFullError, match=r"x needs \d+ bytes and \d+ are free"):
        storage.write("x", parts, 1 << 60)


def test_free_space_is_known_before_the_root_exists(tmp_path: Path) -> None:
    assert (PosixStorage(str(tmp_path / "not/yet")).free_bytes() or 0) > 0


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)


def test_without_hard_links_an_exclusive_rename_takes_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    storage = PosixStorage(str(tmp_path))
    storage.create("x", b"first")
    with pytest.raises(StorageConflictError):
        storage.create("x", b"second")
    assert storage.read("x") == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_file_system_that_can_do_neither_is_refused_with_what_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRename:
        def __init__(self, *_: object, **__: object) -> None: ...

        def renameat2(self, *_: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    refuse_links(monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", NoRename)
    with pytest.raises(StorageDeniedError, match="name a bucket by s3:// or gs://"):
        PosixStorage(str(tmp_path)).create("x", b"")


def test_a_link_that_was_made_though_its_answer_was_lost_counts_as_made(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    OsDisk().link_new(str(tmp_path / "x"), str(tmp_path / "y"))
    OsDisk().link_new(str(tmp_path / "x"), str(tmp_path / "y"))
    (tmp_path / "z").write_bytes(b"2")
    with pytest.raises(FileExistsError):
        OsDisk().link_new(str(tmp_path / "z"), str(tmp_path / "y"))


def test_places_are_opened_by_uri(tmp_path: Path) -> None:
    open_storage(f"file://{tmp_path}/run").create("x", b"1")
    assert (tmp_path / "run/x").read_bytes() == b"1"
    open_storage("pvc://claim/runs/a", pvc_root=str(tmp_path)).create("x", b"1")
    assert (tmp_path / "claim/runs/a/x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("uri", "message"),
    [("hf://org/name", "cannot be hf://"), ("file://./here", "is named by its whole path"), ("/tmp", "is not a URI")],
)
def test_places_that_cannot_hold_checkpoints_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_storage(uri)
