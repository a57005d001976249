"""A storage whose changes are remembered and never made. A dry run works on it, so that it cannot differ from the deed:
the same code does both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from finetune_trainers.checkpoint.storage.errors import (
    StorageConflictError,
    StorageDeniedError,
    StorageMissingError,
)
from finetune_trainers.checkpoint.storage.protocol import Parts, Requests, Storage, Stored, check_whole, fill

__all__ = ["OverlayStorage"]


class OverlayStorage:
    """`inner` as it would be. For small documents: what is written is kept in memory."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self._written: dict[str, bytes] = {}
        self._deleted: set[str] = set()

    @property
    def uri(self) -> str:
        return self._inner.uri

    @property
    def exclusive(self) -> bool:
        return self._inner.exclusive

    @property
    def requests(self) -> Requests:
        return self._inner.requests

    def write(self, name: str, parts: Parts, size: int) -> None:
        self.create(name, b"".join(parts()))

    def create(self, name: str, data: bytes) -> None:
        if self.size(name) is not None:
            raise StorageConflictError(f"{name} is there already")
        self.replace(name, data)

    def replace(self, name: str, data: bytes) -> None:
        self._written[name] = bytes(data)
        self._deleted.discard(name)

    def read(self, name: str) -> bytes:
        self._demand(name)
        return self._written[name] if name in self._written else self._inner.read(name)

    def read_range(self, name: str, start: int, end: int) -> bytes | memoryview:
        self._demand(name)
        if name not in self._written:
            return self._inner.read_range(name, start, end)
        data = self._written[name][start:end]
        check_whole(name, start, end - start, len(data))
        return data

    def read_into(self, name: str, start: int, parts: Sequence[memoryview]) -> None:
        fill(parts, self.read_range(name, start, start + sum(map(len, parts))))

    def size(self, name: str) -> int | None:
        if name in self._written:
            return len(self._written[name])
        return None if name in self._deleted else self._inner.size(name)

    def list(self, prefix: str) -> Iterator[Stored]:
        for name, data in list(self._written.items()):
            if name.startswith(prefix):
                yield Stored(name, len(data))
        for stored in self._inner.list(prefix):
            if stored.name not in self._written and stored.name not in self._deleted:
                yield stored

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._written.pop(name, None)
            self._deleted.add(name)

    def prune(self, folder: str) -> None:
        """Folders without files are not listed anyway."""

    def unfinished(self, older_than_seconds: float) -> Sequence[str] | None:
        with suppress(StorageDeniedError):  # a disk tells its time to those who may write
            return self._inner.unfinished(older_than_seconds)
        return ()

    def discard(self, unfinished: Sequence[str]) -> None:
        """It is not listed anyway."""

    def free_bytes(self) -> int | None:
        return self._inner.free_bytes()

    def _demand(self, name: str) -> None:
        if name in self._deleted:
            raise StorageMissingError(f"{name}: there is no such file")
