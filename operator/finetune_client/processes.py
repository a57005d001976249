"""Finds every process that a run started, wherever it went, and sees to it that none is left.

Called by `runner` and `guardian`. A trainer starts Ray, and Ray starts daemons and workers in sessions of their own
that outlive a trainer which was killed. So a process counts as the run's when it is a descendant of the trainer, or was
one when it was last seen, or is in the trainer's session, or carries the run's mark in its environment.

One kind is not killed with the others: what writes a checkpoint that training has handed over. It is let finish, within
bounds, because all that was trained since the checkpoint before it would be lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

import psutil

__all__ = ["RUN_MARK", "WRITER", "WRITER_SECONDS", "ProcessTree"]

RUN_MARK = "FINETUNE_RUN_MARK"
"""Environment variable whose value is unique to a run; children inherit it."""

WRITER = "finetune_trainers.checkpoint.writer"
"""The module whose processes finish what they write."""
WRITER_SECONDS = 60.0
"""How long they may take."""

_KILL_ROUNDS = 5
"""A process may start another between being seen and being killed: look again this many times."""


class ProcessTree:
    """The processes below `root`, the trainer: remembered, so that they are found after their parents are gone."""

    def __init__(self, root: int, mark: str) -> None:
        self._root = root
        self._mark = mark
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        """Remember the descendants there are now. Cheap enough to call every second."""
        self._seen = {process for process in self._seen if _is_alive(process)}
        self._seen |= _descendants({self._root, *(process.pid for process in self._seen)})

    def survivors(self) -> list[psutil.Process]:
        """The run's processes that are alive, the trainer itself included while it is."""
        strangers = (process for process in psutil.process_iter() if process not in self._seen)
        self._seen |= {process for process in strangers if self._is_ours(process)}
        self.look()
        return sorted((process for process in self._seen if _is_alive(process)), key=lambda process: process.pid)

    def kill(self) -> None:
        """SIGKILL to all of them at once, the trainer first so that it starts no more. Writers go on."""
        for process in sorted(self.survivors(), key=lambda process: process.pid != self._root):
            if not _is_writer(process):
                _ignoring_the_gone(process.kill)

    def clean_up(
        self, leave_seconds: float = 3.0, terminate_seconds: float = 3.0, writer_seconds: float = WRITER_SECONDS
    ) -> int:
        """Give what the trainer left behind time to go, then SIGTERM, then SIGKILL. Returns how many had to be told.

        Call it when the trainer itself has ended. Writers have more time than the others.
        """
        began = time.monotonic()
        others = [process for process in self.survivors() if not _is_writer(process)]
        told = self._end(_wait(others, leave_seconds), terminate_seconds, writers_too=False)
        writers = _wait(self.survivors(), writer_seconds - (time.monotonic() - began))
        return told + self._end(writers, terminate_seconds, writers_too=True)

    def _end(self, left: list[psutil.Process], terminate_seconds: float, writers_too: bool) -> int:
        if not left:
            return 0
        for process in left:
            _ignoring_the_gone(process.terminate)
        _wait(left, terminate_seconds)
        for _ in range(_KILL_ROUNDS):
            stubborn = [process for process in self.survivors() if writers_too or not _is_writer(process)]
            if not stubborn:
                break
            for process in stubborn:
                _ignoring_the_gone(process.kill)
            _wait(stubborn, terminate_seconds)
        return len(left)

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.pid == os.getpid():
            return False
        try:
            return os.getsid(process.pid) == self._root or process.environ().get(RUN_MARK) == self._mark
        except (psutil.Error, OSError):
            return False  # gone, or another user's: ours belong to the user who started the run


def _descendants(roots: set[int]) -> set[psutil.Process]:
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.process_iter(["ppid"]):
        children.setdefault(process.info["ppid"], []).append(process)
    found: set[psutil.Process] = set()
    waiting = list(roots)
    while waiting:
        for child in children.pop(waiting.pop(), ()):
            found.add(child)
            waiting.append(child.pid)
    return found


def _is_writer(process: psutil.Process) -> bool:
    try:
        return WRITER in process.cmdline()
    except psutil.Error:
        return False


def _is_alive(process: psutil.Process) -> bool:
    """A zombie is not: it only waits for its parent to read its exit status."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until all are gone, `seconds` at most. Returns those that are not."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if _is_alive(process)]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if _is_alive(process)]
    return left


def _ignoring_the_gone(action: Callable[[], None]) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return
