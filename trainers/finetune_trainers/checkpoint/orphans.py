"""Writers whose trainer is gone, and the next attempt: it waits for them, as long as they show that they are alive.

A writer that is left alone with work puts a file into the storage and changes it every other second (`Heartbeat`),
until it has finished. The next attempt looks for such files before it takes the fence, which would close what is not
complete (`wait_for_writers`). A file that no longer changes is of a writer that was killed too. Only changes count,
never the time in them, because clocks differ. Where no writer is left nobody waits.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import canonical
from finetune_trainers.checkpoint.storage.errors import StorageError, StorageMissingError
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["BEAT_SECONDS", "Heartbeat", "beat_of", "wait_for_writers"]

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 10.0
"""A writer that has not changed its file for so long counts as dead."""
PATIENCE_SECONDS = 300.0
"""How long a new attempt waits at most."""
_LOOK_SECONDS = 0.5


class Heartbeat:
    """The sign of life of one rank's writer, from `start` to `stop`."""

    def __init__(self, storage: Storage, epoch: int, rank: int) -> None:
        self._storage, self._name = storage, layout.busy(epoch, rank)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing remains, unless it cannot be deleted: then it falls silent, which is as good. May be called without
        `start`."""
        if self._thread.ident is None:
            return
        self._done.set()
        self._thread.join()
        with suppress(StorageError):
            self._storage.delete([self._name])

    def _beat(self) -> None:
        for count in itertools.count():
            with suppress(StorageError):
                self._storage.replace(self._name, canonical({"beat": count}))
            if self._done.wait(BEAT_SECONDS):
                return


def beat_of(storage: Storage, epoch: int, rank: int) -> str:
    """What a writer that was left alone has said last; empty when it has said nothing, or has finished."""
    try:
        return storage.read(layout.busy(epoch, rank)).decode()
    except StorageMissingError:
        return ""


def wait_for_writers(
    storage: Storage,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Wait until no writer of an earlier attempt is at work any more -> seconds waited. Raises StorageError."""
    began = changed = clock()
    seen: dict[str, bytes] = {}
    while True:
        beats = _beats(storage)
        now = clock()
        if beats != seen:
            seen, changed = beats, now
        if not beats or now - changed >= SILENCE_SECONDS or now - began >= PATIENCE_SECONDS:
            storage.delete(list(beats))
            return now - began
        sleep(_LOOK_SECONDS)


def _beats(storage: Storage) -> dict[str, bytes]:
    """What writers have said last."""
    beats = {}
    for stored in list(storage.list(layout.BUSY)):
        with suppress(StorageMissingError):  # it has finished just now
            beats[stored.name] = storage.read(stored.name)
    return beats
