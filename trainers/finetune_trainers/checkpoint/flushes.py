"""One rank's checkpoints on their way from its memory to the storage: staging buffers, and the process that writes.

Called by `saving`. `stage` copies and returns; the rest happens in `writer`, which `poll` listens to. There are two
buffers: one that is being written, and one that waits. While both are taken nothing more can be staged: `is_behind`.

A writer that dies is a failed flush like any other, and the next `stage` starts another one.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune_api.progress import SavedCheckpoint
from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Intent
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.staging import Buffer, laid_out
from finetune_trainers.checkpoint.writer_protocol import (
    Begin,
    Failed,
    Flush,
    GiveUp,
    Published,
    Ready,
    Said,
    StagedAux,
    StagedSet,
    StagedSlice,
    Told,
    Written,
    line,
    said,
)

__all__ = ["COMMAND", "Fill", "Flushes"]

COMMAND: Sequence[str] = (sys.executable, "-P", "-m", "finetune_trainers.checkpoint.writer")
"""The writer's. -P: a random.py in the user's folder must not replace the standard library's."""

NUM_BUFFERS = 2

_ORPHANED = ("/bin/sh", "-c", '"$@" &', "sh")
"""Starts a command and ends at once, so that the command is nobody's child: Ray kills those of a worker that ends."""

Fill = Callable[[Slice, memoryview], None]
"""Copies a slice to where it is staged. Called by several threads, where so many are allowed."""


class Flushes:
    """Not for use by several threads."""

    def __init__(self, begin: Begin, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the writer, which gets ready while training goes on."""
        self._begin = begin
        self._clock = clock
        self._buffers = [Buffer() for _ in range(NUM_BUFFERS)]
        self._writing: dict[int, int] = {}
        """Step -> its buffer, until its part is durable."""
        self._unpublished: list[int] = []
        self.published: SavedCheckpoint | None = None
        """The newest one that rank 0's writer has published."""
        self.flush_seconds: float | None = None
        """What that took, from its first byte to its manifest."""
        self.failures: dict[int, str] = {}
        """Steps of which there will be no checkpoint, and why; whoever has told it takes it out."""
        self.superseded: str | None = None
        """A newer attempt has begun: in its words."""
        self._writer: _Process | None = _Process(begin, [buffer.file for buffer in self._buffers])

    @property
    def writer_pid(self) -> int | None:
        """None until it has said that it is ready."""
        return self._writer.pid if self._writer is not None else None

    @property
    def is_behind(self) -> bool:
        """Neither buffer is free."""
        return len(self._writing) >= NUM_BUFFERS

    @property
    def is_writing(self) -> bool:
        """This rank's part of something is not durable yet."""
        return bool(self._writing)

    @property
    def publishing(self) -> tuple[int, ...]:
        """Rank 0: steps of which it is not known yet whether they will be checkpoints."""
        return tuple(self._unpublished)

    def stage(
        self,
        intent: Intent,
        slices: Sequence[Slice],
        fill: Fill,
        aux: Mapping[str, bytes],
        folder: Path | None = None,
        threads: int = 1,
    ) -> None:
        """Copy this rank's part, by so many threads, and have it written. `aux`: name with suffix -> content. `folder`
        (rank 0) holds files that checkpoints share; it is deleted afterwards. Training may change everything once this
        has returned.

        Raises OSError when there is no memory, or no writer can be started.
        """
        assert not self.is_behind, "nobody stages while both buffers are taken"
        number = next(index for index in range(NUM_BUFFERS) if index not in self._writing.values())
        start, end = _fill_buffer(self._buffers[number], intent, slices, fill, aux, folder, threads)
        if self._writer is None:
            self._writer = _Process(self._begin, [buffer.file for buffer in self._buffers])
        self._writing[intent.step] = number
        if self._begin.rank == 0:
            self._unpublished.append(intent.step)
        self._tell(Flush(buffer=number, start=start, end=end))

    def give_up(self, step: int, reason: str) -> None:
        """Rank 0: another rank could not write its part."""
        if self._writer is not None:
            self._tell(GiveUp(step=step, reason=reason))

    def poll(self, seconds: float = 0.0) -> None:
        """Take in what the writer has said, and wait up to `seconds` until it says something."""
        if self._writer is None:
            return
        for message in self._writer.said(seconds):
            self._take(message)
        if self._writer.ended:
            self._buried("the process that writes checkpoints has died; trainer.log may tell why")

    def wait(self, until: Callable[[], bool], deadline: float) -> bool:
        """Poll until `until` holds -> False when it does not by `deadline` (of the clock)."""
        self.poll()
        while not until():
            left = deadline - self._clock()
            if left <= 0 or self._writer is None:
                return until()
            self.poll(min(left, 1.0))
        return True

    def close(self, deadline: float | None = None) -> None:
        """Nothing more will be staged. The writer finishes, and is waited for until `deadline` or not at all."""
        if self._writer is not None:
            self._writer.finish()
            if deadline is not None:
                self.wait(lambda: self._writer is None, deadline)
        if self._writer is not None:
            self._writer.let_go()
            self._writer = None
        for buffer in self._buffers:
            buffer.close()

    def _tell(self, message: Told) -> None:
        assert self._writer is not None
        self._writer.tell(message)

    def _take(self, message: Said) -> None:
        if isinstance(message, Written):
            self._writing.pop(message.step, None)
        elif isinstance(message, Published):
            self.published, self.flush_seconds = message.checkpoint, message.seconds
            self._unpublished.remove(message.checkpoint.step)
        elif isinstance(message, Failed):
            self._failed(message.step, message.reason)
            if message.superseded:
                self.superseded = message.reason

    def _failed(self, step: int, reason: str) -> None:
        self.failures[step] = reason
        self._writing.pop(step, None)
        if step in self._unpublished:
            self._unpublished.remove(step)

    def _buried(self, reason: str) -> None:
        assert self._writer is not None
        self._writer.let_go()
        self._writer = None
        for step in {*self._writing, *self._unpublished}:
            self._failed(step, reason)


def _fill_buffer(
    buffer: Buffer,
    intent: Intent,
    slices: Sequence[Slice],
    fill: Fill,
    aux: Mapping[str, bytes],
    folder: Path | None,
    threads: int,
) -> tuple[int, int]:
    """-> where the staged set lies: behind what it describes."""
    sizes = [
        (piece.end - piece.start) * ITEM_BYTES[intent.tensors[piece.tensor].states[piece.state]] for piece in slices
    ]
    data = laid_out(sizes)
    small = laid_out([len(content) for content in aux.values()], data.size)
    staged = StagedSet(
        intent=intent,
        slices=tuple(StagedSlice(*piece, offset) for piece, offset in zip(slices, data.offsets, strict=True)),
        aux=tuple(
            StagedAux(name, offset, len(content))
            for (name, content), offset in zip(aux.items(), small.offsets, strict=True)
        ),
        folder=str(folder) if folder is not None else None,
    )
    document = staged.model_dump_json(by_alias=True, exclude_none=True).encode()
    start, end = small.size, small.size + len(document)
    buffer.reserve(end)
    with ThreadPoolExecutor(threads, thread_name_prefix="stage") as pool:
        views = [buffer.view(offset, offset + size) for size, offset in zip(sizes, data.offsets, strict=True)]
        list(pool.map(fill, slices, views))
    for content, offset in zip(aux.values(), small.offsets, strict=True):
        buffer.view(offset, offset + len(content))[:] = content
    buffer.view(start, end)[:] = document
    return start, end


class _Process:
    """A writer, from its start to its last word."""

    def __init__(self, begin: Begin, buffers: Sequence[int]) -> None:
        self.pid: int | None = None
        self.ended = False
        self._channel, theirs = socket.socketpair()
        with theirs:
            subprocess.run(
                [*_ORPHANED, *COMMAND, str(theirs.fileno()), ",".join(map(str, buffers))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *buffers],
                start_new_session=True,
                check=True,
            )
        self._news = select.poll()  # select itself knows no descriptors above 1023, and large groups have those
        self._news.register(self._channel, select.POLLIN)
        self._unread = b""
        self.tell(begin)

    def tell(self, message: Told) -> None:
        """A writer that is dead by now is found out by `said`."""
        with contextlib.suppress(OSError):
            self._channel.sendall(line(message))

    def said(self, seconds: float) -> list[Said]:
        messages: list[Said] = []
        while not self.ended and self._news.poll(0 if messages else 1000 * seconds):
            try:
                data = self._channel.recv(1 << 16)
            except ConnectionError:
                data = b""
            self.ended = not data
            *lines, self._unread = (self._unread + data).split(b"\n")
            messages += [said(one) for one in lines]
        for message in messages:
            if isinstance(message, Ready):
                self.pid = message.pid
        return messages

    def finish(self) -> None:
        """Tell it that nothing more will come."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    def let_go(self) -> None:
        """It ends by itself."""
        self._channel.close()
