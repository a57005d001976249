"""Storages that fail at a chosen moment: any storage between two requests, a disk between two system calls.

A `Schedule` counts boundaries: the moment before an operation takes effect and the moment after, before its caller
knows. A test runs a scenario with the fault at boundary 0, 1, 2, ... until it runs through without meeting it; so every
boundary is tried and none is sampled.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from finetune_trainers.checkpoint.storage.disk import Entry
from finetune_trainers.checkpoint.storage.errors import StorageFullError, StorageUnavailableError
from finetune_trainers.checkpoint.storage.protocol import Parts, Requests, Storage, Stored

Kind = Literal["crash", "full", "io-error", "unavailable", "delay"]
Survival = Literal["process", "power", "names-only", "half"]


class Crash(BaseException):
    """The process is gone. Not an Exception: nothing may handle it."""


@dataclass
class Schedule:
    """A fault of one kind at one boundary. After a crash every operation crashes: a dead process does nothing."""

    at: int | None = None
    kind: Kind = "crash"
    delay: Callable[[], object] = lambda: None
    passed: int = 0
    fired: bool = False
    dead: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    names: list[str] = field(default_factory=list)
    """What happened at each boundary, to name it when a test fails."""

    def boundary(self, what: str) -> None:
        with self.lock:
            if self.dead:
                raise Crash(what)
            self.names.append(what)
            self.passed += 1
            if self.at is None or self.passed - 1 != self.at:
                return
            self.fired = True
            self.dead = self.kind == "crash"
        if self.kind == "crash":
            raise Crash(what)
        if self.kind == "delay":
            self.delay()
        else:
            raise self._error(what)

    def _error(self, what: str) -> Exception:
        return OSError({"full": errno.ENOSPC, "io-error": errno.EIO}.get(self.kind, errno.ETIMEDOUT), what)

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        self.boundary(f"before {what}")
        yield
        self.boundary(f"after {what}")


class FaultingStorage:
    """`inner` with a fault at one boundary: around each request, and at each part of a file that is written."""

    def __init__(self, inner: Storage, schedule: Schedule) -> None:
        self.inner = inner
        self.schedule = schedule

    @property
    def uri(self) -> str:
        return self.inner.uri

    @property
    def exclusive(self) -> bool:
        return self.inner.exclusive

    @property
    def requests(self) -> Requests:
        return self.inner.requests

    @contextmanager
    def _request(self, what: str) -> Iterator[None]:
        try:
            with self.schedule.around(what):
                yield
        except OSError as error:
            kind = StorageFullError if error.errno == errno.ENOSPC else StorageUnavailableError
            raise kind(str(error)) from error

    def write(self, name: str, parts: Parts, size: int) -> None:
        with self._request(f"write {name}"):
            taken = []
            for part in parts():
                self.schedule.boundary(f"part of {name}")
                taken.append(bytes(part))
            self.inner.write(name, lambda: taken, size)

    def create(self, name: str, data: bytes) -> None:
        with self._request(f"create {name}"):
            self.inner.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        with self._request(f"replace {name}"):
            self.inner.replace(name, data)

    def read(self, name: str) -> bytes:
        with self._request(f"read {name}"):
            return self.inner.read(name)

    def read_range(self, name: str, start: int, end: int) -> bytes | memoryview:
        with self._request(f"read {name} [{start}, {end})"):
            return self.inner.read_range(name, start, end)

    def read_into(self, name: str, start: int, parts: Sequence[memoryview]) -> None:
        with self._request(f"read {name} [{start}, {start + sum(map(len, parts))})"):
            self.inner.read_into(name, start, parts)

    def size(self, name: str) -> int | None:
        with self._request(f"size of {name}"):
            return self.inner.size(name)

    def list(self, prefix: str) -> Iterator[Stored]:
        with self._request(f"list {prefix}"):
            return iter(list(self.inner.list(prefix)))

    def delete(self, names: Sequence[str]) -> None:
        """One at a time: the requests of a batch may be carried out in part."""
        for name in names:
            with self._request(f"delete {name}"):
                self.inner.delete([name])

    def prune(self, folder: str) -> None:
        with self._request(f"prune {folder}"):
            self.inner.prune(folder)

    def unfinished(self, older_than_seconds: float) -> Sequence[str] | None:
        with self._request("list unfinished files"):
            return self.inner.unfinished(older_than_seconds)

    def discard(self, unfinished: Sequence[str]) -> None:
        with self._request("discard unfinished files"):
            self.inner.discard(unfinished)

    def free_bytes(self) -> int | None:
        with self._request("free space"):
            return self.inner.free_bytes()


@dataclass
class _File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


@dataclass
class _Folder:
    now: dict[str, _File | _Folder] = field(default_factory=dict)
    synced: dict[str, _File | _Folder] = field(default_factory=dict)


class SimulatedDisk:
    """A disk in memory that knows what has reached the medium, with a fault at one boundary.

    A file's bytes are on the medium when it was synced, a name when its folder was. `survivor` is what is left
    afterwards: of a killed process, everything (the kernel lives on). Of a power cut, what was synced ("power"); or all
    names, but only synced bytes ("names-only"), or half of the others ("half"): file systems write names and bytes
    back in an order of their own. With a `capacity` it is full when it holds so many bytes.
    """

    def __init__(
        self, schedule: Schedule | None = None, root: _Folder | None = None, capacity: int | None = None
    ) -> None:
        self.schedule = schedule or Schedule()
        self.capacity = capacity
        self._root = root or _Folder()
        self._open: dict[int, _File] = {}
        self._descriptors = itertools.count(1000)
        self._clock = 1e9

    def survivor(self, survival: Survival) -> SimulatedDisk:
        return SimulatedDisk(root=_surviving(self._root, survival))

    def open_new(self, path: str) -> int:
        with self.schedule.around(f"open {path}"):
            folder, name = self._place(path)
            if name in folder.now:
                raise FileExistsError(errno.EEXIST, "exists", path)
            file = folder.now[name] = _File()
            descriptor = next(self._descriptors)
            self._open[descriptor] = file
            return descriptor

    def write(self, file: int, data: memoryview) -> int:
        """Takes half of what it is given first: callers must go on with the rest."""
        with self.schedule.around("write"):
            taken = data[: max(len(data) // 2, 1)] if len(data) > 4096 else data
            if self.capacity is not None and self.used + len(taken) > self.capacity:
                raise OSError(errno.ENOSPC, "no space left")
            self._open[file].now += taken
            return len(taken)

    def push(self, file: int, start: int, size: int) -> None:
        """Promises nothing: only what is synced survives."""

    def sync(self, file: int) -> None:
        with self.schedule.around("fsync"):
            self._open[file].synced = bytes(self._open[file].now)

    def close(self, file: int) -> None:
        """Has no effect that could be lost."""

    def sync_folder(self, path: str) -> None:
        with self.schedule.around(f"fsync {path}"):
            folder = self._folder(path)
            folder.synced = dict(folder.now)

    def make_folder(self, path: str) -> None:
        with self.schedule.around(f"mkdir {path}"):
            folder, name = self._place(path)
            if name in folder.now:
                raise FileExistsError(errno.EEXIST, "exists", path)
            folder.now[name] = _Folder()

    def link_new(self, path: str, new: str) -> None:
        with self.schedule.around(f"link {new}"):
            (folder, name), (to, new_name) = self._place(path), self._place(new)
            if new_name in to.now:
                raise FileExistsError(errno.EEXIST, "exists", new)
            to.now[new_name] = folder.now[name]

    def rename(self, path: str, new: str) -> None:
        with self.schedule.around(f"rename {new}"):
            (folder, name), (to, new_name) = self._place(path), self._place(new)
            to.now[new_name] = folder.now.pop(name)

    def remove(self, path: str) -> None:
        with self.schedule.around(f"unlink {path}"):
            folder, name = self._place(path)
            if name not in folder.now:
                raise FileNotFoundError(errno.ENOENT, "no such file", path)
            del folder.now[name]

    def remove_folder(self, path: str) -> None:
        with self.schedule.around(f"rmdir {path}"):
            folder, name = self._place(path)
            if self._folder(path).now:
                raise OSError(errno.ENOTEMPTY, "not empty", path)
            del folder.now[name]

    def read_into(self, path: str, start: int, parts: Sequence[memoryview]) -> int:
        self._alive(path)
        data, filled = self._file(path).now, 0
        for part in parts:
            found = data[start + filled : start + filled + len(part)]
            part[: len(found)] = found
            filled += len(found)
        return filled

    def entry(self, path: str) -> Entry:
        self._alive(path)
        folder, name = self._place(path)
        if name not in folder.now:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return self._entry(name, folder.now[name])

    def entries(self, path: str) -> list[Entry]:
        self._alive(path)
        return [self._entry(name, item) for name, item in self._folder(path).now.items()]

    def free_bytes(self, path: str) -> int:
        self._folder(path)
        return 1 << 40 if self.capacity is None else max(self.capacity - self.used, 0)

    @property
    def used(self) -> int:
        """Bytes of all files."""
        return sum(map(len, {id(file): file.now for file in _files(self._root)}.values()))

    def flip(self, path: str, bit: int) -> None:
        """The medium changes a bit on its own."""
        file = self._file(path)
        file.now[bit // 8] ^= 1 << bit % 8

    def _alive(self, what: str) -> None:
        """Reading changes nothing, so it is no boundary of its own."""
        if self.schedule.dead:
            raise Crash(what)

    def _entry(self, name: str, item: _File | _Folder) -> Entry:
        size = len(item.now) if isinstance(item, _File) else 0
        return Entry(name, isinstance(item, _Folder), size, self._clock)

    def _folder(self, path: str) -> _Folder:
        here = self._root
        for name in path.strip("/").split("/") if path.strip("/") else ():
            found = here.now.get(name)
            if not isinstance(found, _Folder):
                raise FileNotFoundError(errno.ENOENT, "no such folder", path)
            here = found
        return here

    def _place(self, path: str) -> tuple[_Folder, str]:
        parent, name = os.path.split(path)
        return self._folder(parent), name

    def _file(self, path: str) -> _File:
        folder, name = self._place(path)
        found = folder.now.get(name)
        if not isinstance(found, _File):
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return found


def _files(item: _Folder) -> Iterator[_File]:
    for found in item.now.values():
        yield from _files(found) if isinstance(found, _Folder) else (found,)


def _surviving(item: _Folder, survival: Survival) -> _Folder:
    names = item.synced if survival == "power" else item.now
    left: dict[str, _File | _Folder] = {}
    for name, found in names.items():
        left[name] = _surviving(found, survival) if isinstance(found, _Folder) else _left_of(found, survival)
    return _Folder(left, dict(left))


def _left_of(file: _File, survival: Survival) -> _File:
    content = bytes(file.now)
    if survival in ("power", "names-only"):
        content = file.synced
    elif survival == "half":
        content = file.synced + content[len(file.synced) :][: (len(content) - len(file.synced)) // 2]
    return _File(bytearray(content), content)
