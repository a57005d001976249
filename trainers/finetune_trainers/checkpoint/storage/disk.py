"""The system calls of a POSIX storage, one method each. `posix` is the only caller.

They stand here alone so that tests can put another disk in their place: one that fails at any call, and one that
forgets at a power cut whatever was not synced.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Disk", "Entry", "OsDisk"]

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1  # linux/fs.h
_SYNC_FILE_RANGE_WRITE = 2  # the same
_MOST_PARTS = 1024  # IOV_MAX, limits.h
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def _library_push() -> Callable[..., int] | None:
    """sync_file_range(2), where the C library has it."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_push = _library_push()


@dataclass(frozen=True, slots=True)
class Entry:
    """What a folder holds."""

    name: str
    is_folder: bool
    bytes: int
    modified: float
    """Seconds since 1970, by the file system's clock."""


class Disk(Protocol):
    """Paths are absolute. Every method raises OSError as its system call would."""

    def open_new(self, path: str) -> int:
        """A new file for writing -> its descriptor. FileExistsError when there is one."""

    def write(self, file: int, data: memoryview) -> int:
        """-> bytes taken, at least one."""

    def push(self, file: int, start: int, size: int) -> None:
        """The medium may begin with these bytes. Promises nothing and never fails."""

    def sync(self, file: int) -> None:
        """The file's content reaches the medium."""

    def close(self, file: int) -> None: ...

    def sync_folder(self, path: str) -> None:
        """The names in a folder reach the medium."""

    def make_folder(self, path: str) -> None:
        """FileExistsError when there is one."""

    def link_new(self, path: str, new: str) -> None:
        """Give the file at `path` the name `new` in one step. FileExistsError when that is taken. `path` may be gone
        afterwards."""

    def rename(self, path: str, new: str) -> None:
        """In one step, in the place of any file at `new`."""

    def remove(self, path: str) -> None: ...

    def remove_folder(self, path: str) -> None:
        """An empty one."""

    def read_into(self, path: str, start: int, parts: Sequence[memoryview]) -> int:
        """Fills one part after the other with the bytes from `start` on -> how many, fewer than there is room for when
        the file ends before."""

    def entry(self, path: str) -> Entry: ...

    def entries(self, path: str) -> list[Entry]: ...

    def free_bytes(self, path: str) -> int: ...


class OsDisk:
    """The machine's own."""

    def open_new(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, file: int, data: memoryview) -> int:
        return os.write(file, data)

    def push(self, file: int, start: int, size: int) -> None:
        if _push is not None:
            _push(file, start, size, _SYNC_FILE_RANGE_WRITE)

    def sync(self, file: int) -> None:
        os.fsync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def sync_folder(self, path: str) -> None:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def make_folder(self, path: str) -> None:
        Path(path).mkdir(mode=0o755)

    def link_new(self, path: str, new: str) -> None:
        try:
            os.link(path, new)
        except FileExistsError:
            # NFS: the answer to a link that was made may have been lost, and the call sent twice.
            if not os.path.samefile(path, new):  # noqa: PTH121
                raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename_new(path, new)

    def rename(self, path: str, new: str) -> None:
        Path(path).replace(new)

    def remove(self, path: str) -> None:
        Path(path).unlink()

    def remove_folder(self, path: str) -> None:
        Path(path).rmdir()

    def read_into(self, path: str, start: int, parts: Sequence[memoryview]) -> int:
        left, filled = list(parts), 0
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while left and (count := os.preadv(file, left[:_MOST_PARTS], start + filled)):
                filled += count
                left = _but_first(left, count)
        finally:
            os.close(file)
        return filled

    def entry(self, path: str) -> Entry:
        return _entry(Path(path).name, os.stat(path, follow_symlinks=False))  # noqa: PTH116

    def entries(self, path: str) -> list[Entry]:
        found = []
        with os.scandir(path) as scan:
            for item in scan:
                try:
                    found.append(_entry(item.name, item.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue  # deleted since
        return found

    def free_bytes(self, path: str) -> int:
        return shutil.disk_usage(path).free


def _but_first(parts: list[memoryview], count: int) -> list[memoryview]:
    """`parts` without their first `count` bytes."""
    for number, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[number + 1 :]]
        count -= len(part)
    return []


def _entry(name: str, status: os.stat_result) -> Entry:
    return Entry(name, stat.S_ISDIR(status.st_mode), status.st_size, status.st_mtime)


def _rename_new(path: str, new: str) -> None:
    """For file systems without hard links: renameat2(2) that replaces nothing."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        text = (
            "the file system has neither hard links nor renames that replace nothing; name a bucket by s3:// or gs://"
        )
        raise OSError(errno.EPERM, text, new)
    raise OSError(number, os.strerror(number), new)
