"""Processes of ours on loopback: started, waited for and ended; ports that no other test run is given meanwhile.

Nothing outlives its context manager, nor a test run that is killed. Used by all that tests.cluster starts, and by
tests that start the operator itself.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

__all__ = ["Started", "is_alive", "reserved_ports", "started", "wait_until"]

_READY_SECONDS = 120
"""A loaded machine is slow; an idle one needs about four seconds."""
_STOP_SECONDS = 20
_PORTS = range(24000, 32000)
"""Below those that the kernel gives to outgoing connections, and above those that Ray gives to each of its clients:
either could take a port before its owner listens."""
_CLAIMS = Path(tempfile.gettempdir()) / "finetune-operator-ports"


@dataclass(frozen=True)
class Started:
    """A process of ours and what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        """All of its output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_lines(self, count: int = 30) -> str:
        return "\n".join(self.said().splitlines()[-count:])

    def kill(self) -> None:
        """SIGKILL: gone at once, without a word. Does nothing when it has already ended."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, then SIGKILL if it takes too long; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode


@contextmanager
def started(command: Sequence[object], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Started]:
    """A process with its output in `log`, ended on the way out.

    `environment` is added to this process's own. It must be started by a thread that outlives it: Linux ends it
    with that thread, so that a killed test run leaves nothing behind.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_dying_with_us(), *map(str, command)],
            env=os.environ | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends what it started, in order
        )
    one = Started(process, log)
    try:
        yield one
    finally:
        one.stop()


def wait_until(holds: Callable[[], object], what: str, *processes: Started, seconds: float = _READY_SECONDS) -> None:
    """Waits for `holds`.

    AssertionError, with the logs, when it takes too long or one of `processes` ends.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        ended = [one for one in processes if not one.running]
        if ended or time.monotonic() > deadline:
            logs = "\n".join(f"{one.log.name}:\n{one.last_lines()}" for one in ended or processes)
            raise AssertionError(f"{'a process ended while' if ended else 'too long'} waiting for {what}\n{logs}")
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not, nor one that is gone between two questions about it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Ports of loopback that nobody listens on, and that no other test run is given as long as this lasts."""
    _CLAIMS.mkdir(exist_ok=True)
    with ExitStack() as held:
        found: list[int] = []
        for port in random.sample(_PORTS, len(_PORTS)):
            claim = _claim(port)
            if claim is None:
                continue
            held.enter_context(claim)
            if _is_free(port):
                found.append(port)
            if len(found) == count:
                yield found
                return
        raise AssertionError(f"no {count} free ports between {_PORTS.start} and {_PORTS.stop}")


def _claim(port: int) -> IO[str] | None:
    """An open file that is locked for as long as it is open, None when another process holds it."""
    file = (_CLAIMS / str(port)).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _dying_with_us() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
