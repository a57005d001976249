"""A driver as a process on this machine, for those who started it and for those who come later: all they share is disk.

    jobs/<namespace>/<name>/<time>/            the run's folder, as `finetune run` has it, with job.json
    jobs/<namespace>/<name>/<time>.log         what the driver prints
    jobs/<namespace>/<name>/<time>.pid         the driver's process, and when it began: a pid is used again

Used by the local backend, and on a Ray cluster by the actor of the backend for Ray Client.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from finetune_client.driver import STOP_SECONDS
from finetune_client.folders import JOB_FILE, SUBMITTED, SUSPEND_FILE

__all__ = ["PROGRAM", "Driven", "Told"]

PROGRAM: Sequence[str] = (sys.executable, "-P", "-m", "finetune_client.driver")
_LAST_BYTES = 4096
_SAME_SECONDS = 0.005  # the kernel counts hundredths
_CHILDREN: list[subprocess.Popen[bytes]] = []
"""Those that this process has started: it must take note of their end, or they stay as zombies."""


@dataclass(frozen=True)
class Told:
    """How a job stands, as far as its driver's machine knows."""

    document: str | None
    """The job as JSON, as the driver wrote it last."""
    works: bool
    """Whether the driver does."""
    submitted_at: str
    last_output: str
    """What it printed last, when it works no longer."""


class Driven:
    """The driver of one run."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's; it need not be there yet."""
        self.folder = folder
        self._log = folder.with_name(f"{folder.name}.log")
        self._pid = folder.with_name(f"{folder.name}.pid")
        self._document: str | None = None

    def start(self, variables: Mapping[str, str]) -> None:
        """Begin, or go on where the folder holds a run. `variables` are added to this process's own."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*PROGRAM, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(variables) | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        began = _began(psutil.Process(process.pid))
        _CHILDREN.append(process)  # from now on somebody else may take note of its end, and its pid be gone
        unfinished = self._pid.with_suffix(".pid-new")
        unfinished.write_text(json.dumps([process.pid, began]), encoding="utf-8")
        unfinished.replace(self._pid)

    @property
    def works(self) -> bool:
        """Whether the driver does."""
        return self._process() is not None

    def told(self) -> Told:
        """How the job stands."""
        works = self.works  # before what it said last is read
        with suppress(OSError):  # it is not there yet
            self._document = (self.folder / JOB_FILE).read_text(encoding="utf-8")
        last = b"" if works else self.output(max(0, self._log.stat().st_size - _LAST_BYTES))
        submitted = datetime.strptime(self.folder.name, SUBMITTED).replace(microsecond=0, tzinfo=UTC)
        return Told(self._document, works, submitted.isoformat(), last.decode(errors="replace"))

    def output(self, start: int) -> bytes:
        """What the driver has printed from byte `start` on."""
        with self._log.open("rb") as file:
            file.seek(start)
            return file.read()

    def suspend(self) -> None:
        """Ask the driver to suspend the job."""
        if self.works:
            (self.folder / SUSPEND_FILE).touch()

    def stop(self) -> None:
        """End the driver and what it has started."""
        process = self._process()
        if process is None:
            return
        with suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
            with suppress(psutil.TimeoutExpired):
                process.wait(2 * STOP_SECONDS)
                return
            process.kill()  # the guardian of its run ends the rest
            process.wait()

    def forget(self) -> None:
        """Have nobody find this run any more; its folder and its output stay."""
        self._pid.unlink(missing_ok=True)

    def _process(self) -> psutil.Process | None:
        _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
        try:
            pid, began = json.loads(self._pid.read_text(encoding="utf-8"))
            process = psutil.Process(pid)
            is_it = abs(_began(process) - began) < _SAME_SECONDS and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, TypeError, ValueError, psutil.Error):
            return None
        return process if is_it else None


def _began(process: psutil.Process) -> float:
    """Seconds after the machine did: what a clock says moves when that is set."""
    return process.create_time() - psutil.boot_time()
