"""One attempt on this machine: starts the trainers as a process of their own, follows what they report, and ends them.

`attempts` drives it for the operator on this machine; so can any Python program that wants a single try:

    with LocalRun(plan, Path("runs/support-bot")) as run:
        for progress in run.events():
            print(progress.stage, progress.step)
        outcome = run.wait()

The trainers speak through the run's folder only: progress.jsonl while they work, outcome.json at the end,
trainer.log for everything they print. Nothing of theirs is imported here.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from finetune_api.failures import INTERRUPTED, Failure, failure_class_of
from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome, Progress, Result
from finetune_client.guardian import guarded
from finetune_client.processes import RUN_MARK, ProcessTree

__all__ = [
    "RUN_FILES",
    "TRAINERS",
    "LocalRun",
    "RunFolderTaken",
    "missing_packages",
    "outcome_of",
    "written_outcome",
]

TRAINERS: Sequence[str] = (sys.executable, "-P", "-m", "finetune_trainers")
"""The trainers' command. -P: a random.py in the user's folder must not replace the standard library's."""

NEEDED_PACKAGES = ("finetune_trainers", "torch", "ray", "transformers", "deepspeed", "peft")

RUN_FILES = ("plan.json", "progress.jsonl", "outcome.json")
"""A folder with one of these holds a run."""

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_LINGER_SECONDS = 60.0
"""A trainer that has written its outcome and still has not exited after this time is ended."""


class RunFolderTaken(ValueError):
    """The folder holds another run, whose files would be mixed with this one's."""


def missing_packages() -> list[str]:
    """Packages that training needs and this Python lacks. Looks for them without importing them."""
    return [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]


class LocalRun:
    """One run of a plan in a folder. Not for use by several threads at once."""

    def __init__(
        self,
        plan: RunPlan,
        workdir: Path,
        *,
        use_ray: bool = True,
        cache: Path | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        stop_seconds: float = 30.0,
        guarded: Sequence[int] = (),
    ) -> None:
        """`stop_seconds` is how long `stop` lets the trainers finish; `environment` is added to this process's.

        `guarded` are file descriptors, of locks say, that are to stay open until no process of the run is left, even
        if this one is killed.
        """
        self.plan = plan
        self.workdir = workdir.absolute()
        self.latest: Progress | None = None
        """The last report."""
        self.ended = False
        """The trainers have ended, and all that they reported was read."""
        self.stop_requested = False
        self.kill_requested = False
        self.stop_seconds = stop_seconds
        self._command = [*(command or TRAINERS), "run", *self._arguments(use_ray)]
        self._mark = uuid.uuid4().hex
        self._environment = dict(environment or {}) | ({"FINETUNE_CACHE": str(cache.absolute())} if cache else {})
        self._guarded = tuple(guarded)
        self._process: subprocess.Popen[bytes] | None = None
        self._reports = _Lines(self.workdir / "progress.jsonl")
        self._kill_at: float | None = None
        self._ended_at: float | None = None
        self._looked_at = 0.0

    @property
    def log(self) -> Path:
        """Everything that the trainers printed."""
        return self.workdir / "trainer.log"

    @property
    def pid(self) -> int:
        """The trainers' process."""
        return self._started().pid

    def start(self) -> None:
        """Write plan.json and start the trainers. Raises RunFolderTaken, or OSError when the folder is not writable."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        if any((self.workdir / name).exists() for name in RUN_FILES):
            raise RunFolderTaken(f"{self.workdir} holds a run already; name another folder")
        (self.workdir / "plan.json").write_text(self.plan.model_dump_json(by_alias=True, indent=2) + "\n")
        with self.log.open("ab") as log:  # the workers append to it too
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment | self._own_environment(),
                # A session of its own: the terminal's Ctrl-C reaches the caller, who decides what to tell the trainers.
                start_new_session=True,
            )
        self._tree = ProcessTree(self._process.pid, self._mark)
        self._guardian = guarded(self._process.pid, self._mark, self.stop_seconds, self._guarded)

    def poll(self) -> list[Progress]:
        """What was reported since the last call. Also ends what is overdue; sets `ended` with the last reports."""
        running = self._tick()  # asked before reading: what was written before the end is still read
        reports = [progress for line in self._reports.read() if (progress := _parsed(line)) is not None]
        if reports:
            self.latest = reports[-1]
        self.ended = not running
        return reports

    def events(self) -> Iterator[Progress]:
        """Every report, as it comes, until the trainers have ended."""
        while not self.ended:
            yield from self.poll()
            if not self.ended:
                time.sleep(_POLL_SECONDS)

    def wait(self) -> Outcome:
        """Wait for the end, see to it that no process is left, and say how the run ended."""
        for _ in self.events():
            pass
        self._tree.clean_up()
        if self._guardian.returncode is None:
            self._guardian.communicate(b"x")
        return outcome_of(self.workdir, self.exit_code, self.stop_requested, self.latest.step if self.latest else 0)

    @property
    def exit_code(self) -> int:
        """Of the trainers, once they have ended; -n where signal n ended them."""
        return self._started().wait()

    def stop(self, patiently: bool = False) -> None:
        """Ask the trainers to stop cleanly; `poll` and `wait` kill them when they take too long. Returns at once.

        `patiently`: they save, and may take what time they need, until they are asked without.
        """
        if self._started().poll() is not None:
            return
        if not self.stop_requested:
            self.stop_requested = True
            self._started().send_signal(signal.SIGINT)
        if not patiently and self._kill_at is None:
            self._kill_at = time.monotonic() + self.stop_seconds

    def kill(self) -> None:
        """Let `poll` and `wait` kill the trainers and all that they started, now."""
        self.stop_requested = self.kill_requested = True
        self._kill_at = time.monotonic()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaving early, by an exception or a break, leaves no process behind."""
        if self._guardian.returncode is None:
            self.kill()
            self.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start() comes first"
        return self._process

    def _arguments(self, use_ray: bool) -> list[str]:
        folder = ["--plan", str(self.workdir / "plan.json"), "--workdir", str(self.workdir)]
        return folder if use_ray else [*folder, "--no-ray"]

    def _own_environment(self) -> dict[str, str]:
        # SPT_NOENV: Ray renames its workers with setproctitle, which otherwise writes over the mark.
        return {RUN_MARK: self._mark, "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1"}

    def _tick(self) -> bool:
        """Remember the trainers' children, end what is overdue. Returns whether the trainers are still running."""
        if self._started().poll() is not None:
            return False
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._tree.look()
            self._looked_at = now
            if self._ended_at is None and (self.workdir / "outcome.json").exists():
                self._ended_at = now
        if self._is_due(now):
            self._tree.kill()
        return True

    def _is_due(self, now: float) -> bool:
        too_late_to_stop = self._kill_at is not None and now >= self._kill_at
        lingers = self._ended_at is not None and now >= self._ended_at + _LINGER_SECONDS
        return too_late_to_stop or lingers


def outcome_of(workdir: Path, exit_code: int, stop_requested: bool, step: int) -> Outcome:
    """How the run in `workdir` ended: what the trainers wrote, or else what their exit code tells."""
    if (written := written_outcome(workdir)) is not None:
        return written
    if stop_requested or exit_code == INTERRUPTED:
        return Outcome(result=Result.CANCELLED, step=step)
    failure = Failure(failure_class=failure_class_of(exit_code), message=_last_words(exit_code, step), step=step)
    return Outcome(result=Result.FAILED, step=step, failure=failure)


def written_outcome(workdir: Path) -> Outcome | None:
    """What the trainers in `workdir` wrote as their last word; None when they died before they could."""
    try:
        return Outcome.model_validate_json((workdir / "outcome.json").read_bytes())
    except (OSError, ValidationError):
        return None


def _last_words(exit_code: int, step: int) -> str:
    where = f"after step {step}" if step else "before the first step"
    if exit_code == -signal.SIGKILL:
        return (
            f"The trainer was killed (SIGKILL) {where}: by a person, or by the kernel because memory ran out. "
            "Look at the kernel's log, or try a smaller training.microBatchSize."
        )
    if exit_code < 0:
        return f"The trainer died of {signal.Signals(-exit_code).name} {where}."
    return f"The trainer ended with exit code {exit_code} {where} and did not say why."


def _parsed(line: bytes) -> Progress | None:
    """A report; None for a line that is not one, because a damaged report must not end the run."""
    try:
        return Progress.model_validate_json(line)
    except ValidationError:
        return None


class _Lines:
    """The complete lines that were added to a file since the last look. The file may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        complete, newline, _ = added.rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return complete.splitlines()
