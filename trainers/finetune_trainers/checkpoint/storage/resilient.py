"""Any storage, with retries: what may work in a moment is tried again, with growing and jittered pauses.

Only StorageUnavailableError is. A full disk stays full, a torn file stays torn, and both are for the caller to judge.

A new file whose answer was lost is met when it is sent again, by us or by a library below that does not tell. So a
conflict is looked at: the very same bytes mean that it was ours. (They could be another's only if both meant the same:
every document carries its attempt's token.)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from finetune_trainers.checkpoint.storage.errors import StorageConflictError, StorageUnavailableError
from finetune_trainers.checkpoint.storage.protocol import Parts, Requests, Storage, Stored

__all__ = ["Patience", "ResilientStorage"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How often and how long."""

    num_tries: int = 6
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 30.0

    def pauses(self, rng: random.Random) -> Iterator[float]:
        """Seconds before each further try: doubling, and anything between nothing and that, so that the ranks of a
        job that failed together do not come back together."""
        for number in range(self.num_tries - 1):
            yield rng.uniform(0, min(self.first_pause_seconds * 2**number, self.longest_pause_seconds))


class ResilientStorage:
    """`inner` with retries. Sleeping and chance are passed in."""

    def __init__(
        self,
        inner: Storage,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._inner = inner
        self._patience = patience or Patience()
        self._sleep = sleep
        self._rng = rng or random.Random()

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
        try:
            self._retried(lambda: self._inner.write(name, parts, size))
        except StorageConflictError:
            if self.size(name) != size or not self._holds(name, parts):
                raise

    def create(self, name: str, data: bytes) -> None:
        try:
            self._retried(lambda: self._inner.create(name, data))
        except StorageConflictError:
            if self.read(name) != data:
                raise

    def replace(self, name: str, data: bytes) -> None:
        self._retried(lambda: self._inner.replace(name, data))

    def read(self, name: str) -> bytes:
        return self._retried(lambda: self._inner.read(name))

    def read_range(self, name: str, start: int, end: int) -> bytes | memoryview:
        return self._retried(lambda: self._inner.read_range(name, start, end))

    def read_into(self, name: str, start: int, parts: Sequence[memoryview]) -> None:
        self._retried(lambda: self._inner.read_into(name, start, parts))

    def size(self, name: str) -> int | None:
        return self._retried(lambda: self._inner.size(name))

    def list(self, prefix: str) -> Iterator[Stored]:
        return iter(self._retried(lambda: tuple(self._inner.list(prefix))))

    def delete(self, names: Sequence[str]) -> None:
        self._retried(lambda: self._inner.delete(names))

    def prune(self, folder: str) -> None:
        self._retried(lambda: self._inner.prune(folder))

    def unfinished(self, older_than_seconds: float) -> Sequence[str] | None:
        return self._retried(lambda: self._inner.unfinished(older_than_seconds))

    def discard(self, unfinished: Sequence[str]) -> None:
        self._retried(lambda: self._inner.discard(unfinished))

    def free_bytes(self) -> int | None:
        return self._retried(self._inner.free_bytes)

    def _retried(self, call: Callable[[], Result]) -> Result:
        for pause in self._patience.pauses(self._rng):
            try:
                return call()
            except StorageUnavailableError:
                self._sleep(pause)
        return call()

    def _holds(self, name: str, parts: Parts) -> bool:
        offset = 0
        for part in parts():
            data = memoryview(part).cast("B")
            if memoryview(self.read_range(name, offset, offset + len(data))) != data:
                return False
            offset += len(data)
        return True
