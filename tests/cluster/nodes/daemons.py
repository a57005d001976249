"""Programs that go on after whoever started them: the cluster's own, each with a log and a file that says who it is.

Unlike tests.cluster.processes, whose processes end with the test run, these stay until `down`. They are told from a
stranger that was given the same process number by the time at which they began.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.nodes.layout import Layout, Node

__all__ = ["DaemonFailed", "kill", "kill_all", "processes_naming", "running", "start", "wait"]

_STOP_SECONDS = 15
_READY_SECONDS = 180


class DaemonFailed(Exception):
    """A program ended, or something did not come about in time; the message has the end of the log."""


def start(layout: Layout, name: str, command: Sequence[object], node: Node, **environment: str) -> None:
    """Starts a program in the network namespace of `node`, unless it runs already."""
    if running(layout, name):
        return
    layout.logs.mkdir(parents=True, exist_ok=True)
    # Only the network: ip netns exec would mount another /sys and hide the control groups.
    entered = ["nsenter", f"--net=/run/netns/{node.namespace}", "--wd=/", *map(str, command)]
    log, write = str(layout.logs / f"{name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, write, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # Not subprocess, which expects that whoever starts a program waits for it.
    pid = os.posix_spawnp("nsenter", entered, os.environ | environment, file_actions=files, setsid=True)
    layout.run.mkdir(parents=True, exist_ok=True)
    _file(layout, name).write_text(f"{pid} {_began(pid)}", encoding="ascii")


def running(layout: Layout, name: str) -> bool:
    return _pid(layout, name) is not None


def kill(layout: Layout, name: str) -> None:
    """SIGKILL: gone at once."""
    pid = _pid(layout, name)
    if pid is not None:
        kill_all([pid])
    _file(layout, name).unlink(missing_ok=True)


def kill_all(pids: Iterable[int]) -> None:
    """SIGKILL to each that still lives, and waits until the kernel has taken them away."""
    pids = list(pids)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + _STOP_SECONDS
    while any(_began(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def processes_naming(text: str) -> list[int]:
    """Processes with `text` in their command line, such as the path of a socket of ours."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            if text.encode() in command:
                found.append(int(folder.name))
    return found


def wait(layout: Layout, holds: Callable[[], object], what: str, *names: str) -> None:
    """Waits for `holds` as long as the programs `names` run. Raises DaemonFailed."""
    deadline = time.monotonic() + _READY_SECONDS
    while not holds():
        ended = [name for name in names if not running(layout, name)]
        if ended or time.monotonic() > deadline:
            logs = "\n".join(f"{name}:\n{_last_lines(layout, name)}" for name in ended or names)
            raise DaemonFailed(f"{'a program ended while' if ended else 'too long'} waiting for {what}\n{logs}")
        time.sleep(0.1)


def _last_lines(layout: Layout, name: str) -> str:
    log = (layout.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    return "\n".join(log.splitlines()[-15:])


def _file(layout: Layout, name: str) -> Path:
    return layout.run / f"{name}.pid"


def _pid(layout: Layout, name: str) -> int | None:
    try:
        pid, began = _file(layout, name).read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(pid) if _began(int(pid)) == began else None


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty when there is none, or only its remains."""
    try:
        # Behind the name, which is in parentheses and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]
