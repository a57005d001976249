"""The process that writes a rank's part of checkpoints: `python -m finetune_trainers.checkpoint.writer SOCKET BUFFERS`.

Started by `flushes` with a socket and the staging buffers as inherited descriptors (BUFFERS: their numbers, with
commas). It imports no torch, so it starts at once and is small, and it runs at a low priority.

It outlives its trainer: it is in a session of its own and nobody's child, so that neither a signal to the trainer's
group nor Ray's cleaning up after a worker reaches it. When the trainer is gone it finishes what was staged; rank 0's
waits for the receipts of the others as long as they show that they live, and publishes. Should a newer attempt have
begun, the fence says so, and nothing is published. Then it ends, and the memory with it.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.progress import SavedCheckpoint
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.commit import abandon, conclude, settle_own
from finetune_trainers.checkpoint.fence import SupersededError
from finetune_trainers.checkpoint.folders import folder_records, store_folder
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Intent, Manifest
from finetune_trainers.checkpoint.orphans import Heartbeat, beat_of
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.storage.errors import StorageError, StorageFullError, StorageUnavailableError
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import clear_leftovers, sweep
from finetune_trainers.checkpoint.write import announce, write_rank
from finetune_trainers.checkpoint.writer_protocol import (
    Begin,
    Failed,
    Flush,
    GiveUp,
    Published,
    Ready,
    Said,
    StagedSet,
    Told,
    Written,
    line,
    told,
)

__all__ = ["Receipts", "demand_space", "main", "saved_checkpoint"]

RECEIPT_SECONDS = 1800.0
"""How long rank 0 waits for the receipts of other ranks after its own, while its trainer lives."""
ORPHAN_SECONDS = 300.0
"""The same, once its trainer is gone."""
SILENCE_SECONDS = 20.0
"""The same, where the rank that is missing shows no sign of life: its machine is lost, and its writer with it."""
_NICE = 15
"""On a machine that is all busy it gets one part in thirty beside one training thread."""
_PAUSES = (0.05, 2.0)
"""Seconds between two looks for receipts: the first, growing to the last."""
_log = logging.getLogger(__name__)


def main() -> None:
    _step_back()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s writer %(levelname)s %(message)s", force=True
    )
    channel = socket.socket(fileno=int(sys.argv[1]))
    _Writer(channel, [int(number) for number in sys.argv[2].split(",")]).run()


def _step_back() -> None:
    """Training goes first. Linux may weigh whole sessions against each other, and this one is in its own."""
    os.nice(_NICE)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_NICE))


def saved_checkpoint(root: str, manifest: Manifest, saved_at: datetime) -> SavedCheckpoint:
    """What is reported of a checkpoint below the storage at `root`."""
    return SavedCheckpoint(
        uri=f"{root.rstrip('/')}/{layout.folder(manifest.id).rstrip('/')}",
        step=manifest.id.step,
        saved_at=saved_at,
        world_size=manifest.intent.world.size,
        bytes=manifest.bytes,
    )


def demand_space(storage: Storage, intent: Intent) -> None:
    """Raises StorageFullError when all ranks' parts together will not fit, as far as the storage can tell, not even
    where saves that have failed had lain."""
    needed = sum(tensor.numel * ITEM_BYTES[kind] for tensor in intent.tensors for kind in tensor.states.values())
    free = storage.free_bytes()
    if free is not None and free < needed and clear_leftovers(storage):
        free = storage.free_bytes()
    if free is not None and free < needed:
        raise StorageFullError(f"the checkpoint needs {needed} bytes, and {free} are free at {storage.uri}")


class Receipts:
    """Waits until all ranks have left their receipt. Time and waiting are passed in."""

    def __init__(self, storage: Storage, clock: Callable[[], float], wait: Callable[[float], object]) -> None:
        self._storage = storage
        self._clock = clock
        self._wait = wait
        self.given_up: dict[int, str] = {}
        """Steps that will not be complete, with the reason."""
        self.orphaned_at: float | None = None
        """When the trainer went."""

    def missing(self, checkpoint: CheckpointId, world: int) -> str | None:
        """None when all are there; otherwise why they will not be. A storage that cannot be reached for a while is
        asked again. Raises any other StorageError."""
        began = alive_at = self._clock()
        pause, late, trouble, seen = _PAUSES[0], 0, "", ""
        while True:
            if (reason := self.given_up.get(checkpoint.step)) is not None:
                return reason
            try:
                listing, trouble = listed(self._storage, checkpoint)[checkpoint], ""
                if len(listing.ranks) >= world:
                    return None
                late = min(set(range(world)) - set(listing.ranks))
                sign = f"{late} {len(listing.sizes)} {beat_of(self._storage, checkpoint.epoch, late)}"
            except StorageUnavailableError as error:
                trouble, sign = f" ({error.message})", error.message  # whether it lives is not known
                alive_at = self._clock()
            if sign != seen:
                seen, alive_at = sign, self._clock()
            if self._clock() >= self._deadline(began, alive_at):
                return f"rank {late} has not written its part, {self._clock() - began:.0f} s after rank 0{trouble}"
            self._wait(pause)
            pause = min(2 * pause, _PAUSES[1])

    def _deadline(self, began: float, alive_at: float) -> float:
        """`alive_at`: when the rank that is waited for showed that it lives."""
        latest = began + RECEIPT_SECONDS
        if self.orphaned_at is None:
            return latest
        since = max(began, self.orphaned_at)
        return min(latest, since + ORPHAN_SECONDS, max(since, alive_at) + SILENCE_SECONDS)


class _Writer:
    """One rank's. A thread listens; everything else happens in the order in which it was staged."""

    def __init__(self, channel: socket.socket, buffers: list[int]) -> None:
        self._channel = channel
        self._lines = channel.makefile("rb")
        self._buffers = buffers
        self._maps: dict[int, mmap.mmap] = {}
        self._orders: queue.SimpleQueue[Flush | None] = queue.SimpleQueue()
        self._news = threading.Event()
        self._num_given = self._num_done = 0
        """Staged sets. Each number is changed by one thread."""

    def run(self) -> None:
        begin = told(self._lines.readline())
        assert isinstance(begin, Begin)
        self._begin = begin
        self._storage = open_storage(begin.uri, begin.pvc_root, exclusive=begin.exclusive)
        self._receipts = Receipts(self._storage, time.monotonic, self._wait)
        self._heartbeat = Heartbeat(self._storage, begin.fence.epoch, begin.rank)
        self._say(Ready(pid=os.getpid()))
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        self._take_memory()
        while (order := self._orders.get()) is not None:
            self._flush(order)
            self._num_done += 1
        self._heartbeat.stop()

    def _listen(self) -> None:
        try:
            with suppress(OSError):  # a trainer that was killed may leave behind what it was told and did not read
                for data in self._lines:
                    self._heed(told(data))
        finally:
            self._receipts.orphaned_at = time.monotonic()
            if self._num_given > self._num_done:
                self._heartbeat.start()
            self._orders.put(None)
            self._news.set()

    def _heed(self, message: Told) -> None:
        if isinstance(message, Flush):
            self._num_given += 1
            self._orders.put(message)
        elif isinstance(message, GiveUp):
            self._receipts.given_up[message.step] = message.reason
            self._news.set()

    def _wait(self, seconds: float) -> None:
        """Until there is news from the trainer."""
        self._news.wait(seconds)
        self._news.clear()

    def _take_memory(self) -> None:
        """The pages of the first buffer, so that the first copy into it does not have to."""
        if self._begin.expected_bytes and hasattr(os, "posix_fallocate"):
            with suppress(OSError):  # the copy will say what is wrong
                os.posix_fallocate(self._buffers[0], 0, self._begin.expected_bytes)

    def _say(self, message: Said) -> None:
        with suppress(OSError):  # the trainer is gone
            self._channel.sendall(line(message))

    def _flush(self, order: Flush) -> None:
        began, memory = time.monotonic(), self._memory(order)
        staged = StagedSet.model_validate_json(bytes(memory[order.start : order.end]))
        try:
            if self._begin.rank == 0 and not self._num_done:
                settle_own(self._storage, self._begin.fence, staged.intent.id)
            self._write(staged, memory)
        except SupersededError as error:
            self._say(Failed(step=staged.intent.step, reason=error.message, superseded=True))
            return
        except (StorageError, OSError) as error:
            self._fail(staged.intent, str(error))
            return
        finally:
            if staged.folder is not None:
                shutil.rmtree(staged.folder, ignore_errors=True)
        self._say(Written(step=staged.intent.step, seconds=time.monotonic() - began))
        if self._begin.rank == 0:
            self._publish(staged.intent, began)

    def _memory(self, order: Flush) -> memoryview:
        held = self._maps.get(order.buffer)
        if held is None or len(held) < order.end:  # it has grown
            file = self._buffers[order.buffer]
            held = self._maps[order.buffer] = mmap.mmap(file, os.fstat(file).st_size, prot=mmap.PROT_READ)
        return memoryview(held)

    def _write(self, staged: StagedSet, memory: memoryview) -> None:
        intent = staged.intent
        if self._begin.rank == 0:
            demand_space(self._storage, intent)
            folder = Path(staged.folder) if staged.folder is not None else None
            if folder is not None:
                intent = intent.model_copy(update={"blobs": folder_records(folder)})
            announce(self._storage, intent)
            if folder is not None:
                store_folder(self._storage, folder, intent.blobs)
        held = {(row.tensor, row.state): row for row in staged.slices}

        def data(piece: Slice) -> memoryview:
            """A shard may end in the middle of a staged slice, and the next one go on there."""
            row = held[piece.tensor, piece.state]
            item = ITEM_BYTES[intent.tensors[piece.tensor].states[piece.state]]
            begin = row.offset + (piece.start - row.start) * item
            return memory[begin : begin + (piece.end - piece.start) * item]

        aux = {part.name: bytes(memory[part.offset : part.offset + part.size]) for part in staged.aux}
        slices = [Slice(row.tensor, row.state, row.start, row.end) for row in staged.slices]
        write_rank(self._storage, intent, self._begin.rank, slices, data, aux)

    def _publish(self, intent: Intent, began: float) -> None:
        try:
            reason = self._receipts.missing(intent.id, intent.world.size)
            if reason is not None and self._receipts.orphaned_at is not None:
                _log.warning("checkpoint %s is left to the next attempt: %s", intent.id, reason)
                return
            if reason is not None:
                self._fail(intent, reason)
                return
            manifest = conclude(self._storage, self._begin.fence, intent.id)
        except SupersededError as error:
            self._say(Failed(step=intent.step, reason=error.message, superseded=True))
            return
        except StorageError as error:
            self._fail(intent, str(error))
            return
        checkpoint = saved_checkpoint(self._begin.uri, manifest, datetime.now(UTC))
        _log.info("checkpoint %s: %d bytes at %s", manifest.id, manifest.bytes, self._begin.uri)
        self._say(Published(checkpoint=checkpoint, seconds=time.monotonic() - began))
        self._sweep()

    def _fail(self, intent: Intent, reason: str) -> None:
        _log.warning("checkpoint %s could not be saved: %s", intent.id, reason)
        if self._begin.rank == 0:
            with suppress(StorageError):  # then the next attempt closes it
                abandon(self._storage, self._begin.fence, intent.id, reason)
        self._say(Failed(step=intent.step, reason=reason))

    def _sweep(self) -> None:
        """Deleting old ones may fail: there is another time."""
        parent = self._begin.protected
        protected = [CheckpointId(parent.epoch, parent.step)] if parent is not None else []
        try:
            sweep(self._storage, self._begin.retention, self._begin.fence, protected)
        except (StorageError, SupersededError) as error:
            _log.warning("old checkpoints could not be deleted: %s", error)


if __name__ == "__main__":
    main()
