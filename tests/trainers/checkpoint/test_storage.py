"""What every storage promises, asked of each kind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from finetune_trainers.checkpoint.storage.errors import (
    StorageConflictError,
    StorageError,
    StorageMissingError,
    StorageTornError,
)
from finetune_trainers.checkpoint.storage.opening import refuses_to_overwrite
from finetune_trainers.checkpoint.storage.protocol import Storage, Stored


def names(storage: Storage, prefix: str = "") -> list[str]:
    return sorted(stored.name for stored in storage.list(prefix))


def test_what_is_written_is_read(storage: Storage) -> None:
    parts: list[bytes | memoryview] = [b"abc", memoryview(b"defg"), b""]
    storage.write("a/b/file", lambda: iter(parts), 7)
    assert storage.read("a/b/file") == b"abcdefg"
    assert bytes(storage.read_range("a/b/file", 2, 5)) == b"cde"
    assert bytes(storage.read_range("a/b/file", 3, 3)) == b""
    assert storage.size("a/b/file") == 7
    assert list(storage.list("a/")) == [Stored("a/b/file", 7)]


def test_a_range_is_read_into_memory_of_several_parts(storage: Storage) -> None:
    """More of them than one system call takes, and some of them empty."""
    data = bytes(range(256)) * 40
    storage.create("file", data)
    parts = [memoryview(bytearray(number % 4)) for number in range(4000)]
    storage.read_into("file", 10, parts)
    assert b"".join(parts) == data[10 : 10 + sum(map(len, parts))]
    with pytest.raises(StorageTornError, match=r"file: bytes \[10238, 10243\) are wanted and it ends at 10240"):
        storage.read_into("file", 10238, [memoryview(bytearray(3)), memoryview(bytearray(2))])


@pytest.mark.parametrize("num_blocks", [9, 18])
def test_a_file_of_many_megabytes_arrives_whole(storage: Storage, num_blocks: int) -> None:
    block = bytes(range(256)) * (1 << 14)
    storage.write("large", lambda: (block for _ in range(num_blocks)), num_blocks * len(block))
    assert storage.size("large") == num_blocks * len(block)
    assert bytes(storage.read_range("large", 8 * len(block) - 2, 8 * len(block) + 3)) == b"\xfe\xff\x00\x01\x02"


def test_creating_what_is_there_fails_and_changes_nothing(storage: Storage) -> None:
    assert storage.exclusive
    storage.create("x", b"first")
    with pytest.raises(StorageConflictError, match="x"):
        storage.create("x", b"second")
    assert storage.read("x") == b"first"


def test_of_all_who_create_at_once_one_succeeds(storage: Storage) -> None:
    together = Barrier(8)

    def attempt(number: int) -> bool:
        together.wait()
        try:
            storage.create("contested", b"%d" % number)
        except StorageConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert won.count(True) == 1
    assert storage.read("contested") == b"%d" % won.index(True)


def test_replacing_needs_nothing_there_and_leaves_one_file(storage: Storage) -> None:
    storage.replace("head", b"1")
    storage.replace("head", b"22")
    assert storage.read("head") == b"22"
    assert names(storage) == ["head"]


def test_what_is_not_there_is_said_to_be_missing(storage: Storage) -> None:
    assert storage.size("no/where") is None
    assert names(storage, "no/") == []
    with pytest.raises(StorageMissingError, match="no/where"):
        storage.read("no/where")
    with pytest.raises(StorageMissingError, match="no/where"):
        storage.read_range("no/where", 0, 1)


def test_a_file_that_ends_before_the_range_is_torn(storage: Storage) -> None:
    storage.create("short", b"0123")
    with pytest.raises(StorageTornError, match=r"short: bytes \[2, 6\) are wanted and it ends at 4"):
        storage.read_range("short", 2, 6)
    with pytest.raises(StorageError, match="short"):
        storage.read_range("short", 10, 20)


def test_a_listing_is_of_the_prefix_and_all_below_it(storage: Storage) -> None:
    for name in ("a/1", "a/b/2", "ab/3", "4"):
        storage.create(name, b"")
    assert names(storage, "a/") == ["a/1", "a/b/2"]
    assert names(storage) == ["4", "a/1", "a/b/2", "ab/3"]


def test_a_listing_of_more_than_a_page_is_whole(storage: Storage) -> None:
    def make(number: int) -> None:
        storage.replace(f"many/{number:04d}", b"")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(1100)))
    assert len(names(storage, "many/")) == 1100
    storage.delete([f"many/{number:04d}" for number in range(1100)])
    assert names(storage) == []


def test_deleting_what_is_gone_is_no_error(storage: Storage) -> None:
    storage.create("d/x", b"1")
    storage.delete(["d/x", "d/y", "e/z"])
    storage.delete(["d/x"])
    storage.delete([])
    assert names(storage) == []
    storage.prune("d/")
    storage.prune("never/was/")


def test_a_writer_that_fails_half_way_leaves_no_file(storage: Storage) -> None:
    def parts() -> object:
        yield b"x" * (20 << 20)
        raise RuntimeError("the trainer died")

    with pytest.raises(Exception, match="the trainer died"):
        storage.write("half", parts, 40 << 20)  # type: ignore[arg-type]
    assert storage.size("half") is None
    assert names(storage) == []


def test_a_probe_tells_whether_creating_is_exclusive_and_leaves_nothing(storage: Storage) -> None:
    assert refuses_to_overwrite(storage)
    assert names(storage) == []
