"""A folder as a storage: a local disk, a PersistentVolumeClaim, NFS.

A file is written under a name of its own beside its place (`.<name>.<random>.unfinished`), synced, given its name by
link(2), which fails when that is taken, and the folder is synced. A crash leaves at most an unfinished file, which no
listing shows. After a failed fsync the kernel may have dropped the pages that it could not write, and a second fsync
would succeed: such a file is given up (StorageTornError), never tried again.
"""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath

from finetune_trainers.checkpoint.storage.disk import Disk, Entry, OsDisk
from finetune_trainers.checkpoint.storage.errors import (
    StorageDeniedError,
    StorageFullError,
    StorageTornError,
    from_os_error,
)
from finetune_trainers.checkpoint.storage.protocol import Parts, Requests, Stored, check_whole

__all__ = ["PosixStorage"]

_UNFINISHED = ".unfinished"
_PUSH_BYTES = 8 << 20


class PosixStorage:
    """Files below one folder, which is made when it is needed."""

    exclusive = True
    requests = Requests(longest=64 << 20, at_once=4, buffered=False)
    """A whole shard each: the kernel reads ahead in it. More threads would wait for the interpreter's lock."""

    def __init__(self, root: str, disk: Disk | None = None) -> None:
        """`root` is absolute."""
        assert root.startswith("/")
        self._root = root.rstrip("/")
        self._disk = disk or OsDisk()

    @property
    def uri(self) -> str:
        return f"file://{self._root}"

    def write(self, name: str, parts: Parts, size: int) -> None:
        free = self.free_bytes()
        if free is not None and free < size:
            raise StorageFullError(f"{name} needs {size} bytes and {free} are free under {self._root}")
        with self._unfinished(name, parts) as (path, place):
            self._link_new(path, place, name)

    def create(self, name: str, data: bytes) -> None:
        with self._unfinished(name, lambda: [data]) as (path, place):
            self._link_new(path, place, name)

    def replace(self, name: str, data: bytes) -> None:
        with self._unfinished(name, lambda: [data]) as (path, place), _named(name):
            self._disk.rename(path, place)

    def read(self, name: str) -> bytes:
        with _named(name):
            data = bytearray(self._disk.entry(self._path(name)).bytes)
            count = self._disk.read_into(self._path(name), 0, [memoryview(data)])
        return bytes(memoryview(data)[:count])

    def read_range(self, name: str, start: int, end: int) -> memoryview:
        data = memoryview(bytearray(end - start))
        self.read_into(name, start, [data])
        return data

    def read_into(self, name: str, start: int, parts: Sequence[memoryview]) -> None:
        with _named(name):
            count = self._disk.read_into(self._path(name), start, parts)
        check_whole(name, start, sum(map(len, parts)), count)

    def size(self, name: str) -> int | None:
        with _named(name):
            try:
                entry = self._disk.entry(self._path(name))
            except FileNotFoundError:
                return None
        return None if entry.is_folder else entry.bytes

    def list(self, prefix: str) -> Iterator[Stored]:
        for name, entry in self._walk(prefix):
            if not entry.name.endswith(_UNFINISHED):
                yield Stored(name, entry.bytes)

    def delete(self, names: Sequence[str]) -> None:
        folders = {}
        for name in names:
            with _named(name), suppress(FileNotFoundError):
                self._disk.remove(self._path(name))
                folders[str(PurePosixPath(self._path(name)).parent)] = name
        for folder, name in folders.items():
            self._sync_folder(folder, name)

    def prune(self, folder: str) -> None:
        path = self._path(folder.rstrip("/"))
        with _named(folder), suppress(FileNotFoundError):
            for entry in self._disk.entries(path):
                if entry.name.endswith(_UNFINISHED):
                    self._disk.remove(f"{path}/{entry.name}")
            try:
                self._disk.remove_folder(path)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # somebody writes there still: left for the next time
                    raise

    def unfinished(self, older_than_seconds: float) -> Sequence[str]:
        left = [(name, entry) for name, entry in self._walk("") if entry.name.endswith(_UNFINISHED)]
        now = self._file_system_time() if left else 0.0
        return [name for name, entry in left if now - entry.modified > older_than_seconds]

    def discard(self, unfinished: Sequence[str]) -> None:
        self.delete(unfinished)

    def free_bytes(self) -> int | None:
        path = PurePosixPath(self._root)
        for place in (path, *path.parents):
            with _named(self._root), suppress(FileNotFoundError):
                return self._disk.free_bytes(str(place))
        return None

    def _path(self, name: str) -> str:
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "" in parts:
            raise StorageDeniedError(f"{name!r} is not the name of a file in a storage")
        return f"{self._root}/{name}"

    @contextmanager
    def _unfinished(self, name: str, parts: Parts) -> Iterator[tuple[str, str]]:
        """(path of a synced file beside the place of `name`, that place); afterwards the place is synced."""
        place = self._path(name)
        folder, _, last = place.rpartition("/")
        path = f"{folder}/.{last}.{secrets.token_hex(4)}{_UNFINISHED}"
        try:
            self._fill(path, name, parts)
            yield path, place
        finally:
            with suppress(OSError):  # the file has its name by now, or is swept later
                self._disk.remove(path)
        self._sync_folder(folder, name)

    def _fill(self, path: str, name: str, parts: Parts) -> None:
        with _named(name):
            file, taken, pushed = self._open_new(path), 0, 0
            try:
                for part in parts():
                    left = memoryview(part).cast("B")
                    while left:
                        written = self._disk.write(file, left)
                        taken, left = taken + written, left[written:]
                    if taken - pushed >= _PUSH_BYTES:  # else all would be written while the last call waits for it
                        self._disk.push(file, pushed, taken - pushed)
                        pushed = taken
                self._sync(file, name)
            finally:
                self._disk.close(file)

    def _open_new(self, path: str) -> int:
        try:
            return self._disk.open_new(path)
        except FileNotFoundError:
            self._make_folder(path.rpartition("/")[0])
            return self._disk.open_new(path)

    def _make_folder(self, path: str) -> None:
        """With those above it; each is synced into its parent, or a power cut could take it with all that it holds."""
        parent = path.rpartition("/")[0] or "/"
        try:
            self._disk.make_folder(path)
        except FileExistsError:
            return
        except FileNotFoundError:
            self._make_folder(parent)
            with suppress(FileExistsError):
                self._disk.make_folder(path)
        self._disk.sync_folder(parent)

    def _link_new(self, path: str, place: str, name: str) -> None:
        with _named(name):
            self._disk.link_new(path, place)

    def _sync(self, file: int, name: str) -> None:
        try:
            self._disk.sync(file)
        except OSError as error:
            raise _torn(error, name) from error

    def _sync_folder(self, folder: str, name: str) -> None:
        try:
            self._disk.sync_folder(folder)
        except FileNotFoundError:
            return  # pruned by another process, with what was in it
        except OSError as error:
            raise _torn(error, name) from error

    def _walk(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        folder = prefix.rstrip("/")
        path = self._path(folder) if folder else self._root
        with _named(prefix):
            try:
                entries = self._disk.entries(path)
            except FileNotFoundError:
                return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_folder:
                yield from self._walk(name)
            else:
                yield name, entry

    def _file_system_time(self) -> float:
        """What its clock says now; this machine's may be an hour off."""
        path = f"{self._root}/.now.{secrets.token_hex(4)}{_UNFINISHED}"
        with _named(path):
            self._disk.close(self._disk.open_new(path))
            modified = self._disk.entry(path).modified
            self._disk.remove(path)
        return modified


@contextmanager
def _named(name: str) -> Iterator[None]:
    """OSErrors become StorageErrors that name the file."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, name) from error


def _torn(error: OSError, name: str) -> Exception:
    """Of a failed fsync. A full disk may show itself only here, and says so."""
    known = from_os_error(error, name)
    return known if isinstance(known, StorageFullError) else StorageTornError(f"{known.message} (at fsync)")
