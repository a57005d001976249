"""The folder of a run: whose it is, where each job's files are, and what is needed to go on after an interruption.

    runs/<job>/<time>/
      state.json       the objects of the local cluster: the job with its status, its plan, what it reported
      checkpoints/     what attempts left for each other to go on from
      plan.json, progress.jsonl, outcome.json, artifact/, ...      of the last attempt
      attempt-1/       the same of an attempt before it

The files of the last attempt stand at the top, so that whoever looks finds them where they always were; an attempt
that is followed by another makes room for it. With several jobs in one run, each has a folder of its own below.

Used by `session` and `attempts`.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from finetune_api.job import FineTuneJob
from finetune_client.runner import RUN_FILES, RunFolderTaken
from finetune_operator.kinds import Key

__all__ = [
    "JOB_FILE",
    "STATE_FILE",
    "SUBMITTED",
    "SUBMITTED_NAME",
    "SUSPEND_FILE",
    "NoRun",
    "RunFolder",
    "RunState",
    "jobs_in",
]

STATE_FILE = "state.json"
JOB_FILE = "job.json"
"""The job as a driver told it last, for those who look from elsewhere."""
SUBMITTED = "%Y%m%d-%H%M%S-%f"
"""What the folder of a submitted job is called: two of one name may come in one second."""
SUBMITTED_NAME = re.compile(r"\d{8}-\d{6}-\d{6}")
"""What comes of it."""
SUSPEND_FILE = "suspend-requested"
"""Somebody's wish, until the driver has seen it."""
_ATTEMPT = "attempt-"
_OF_ALL_ATTEMPTS = frozenset({STATE_FILE, JOB_FILE, SUSPEND_FILE, "checkpoints"})
"""What stays where it is when another attempt begins."""
_VERSION = 1
_LOCK_WAIT_SECONDS = 60.0
"""Longer than what is left of a killed run takes to end."""


class NoRun(ValueError):
    """The folder holds no run that could go on; the message says what would be right."""


@dataclass
class RunState:
    """What `--resume` needs: kept in state.json."""

    objects: list[dict[str, Any]] = field(default_factory=list)
    """Of the local cluster."""
    attempts: dict[str, int] = field(default_factory=dict)
    """By folder, relative to the run's: the number of the attempt whose files stand at its top."""
    folders: dict[str, str] = field(default_factory=dict)
    """By namespace/name of the job: its folder, relative to the run's."""
    use_ray: bool = True
    cache: str | None = None


class RunFolder:
    """A run's folder, in the hands of one process at a time. Use it as a context."""

    def __init__(
        self, path: Path, state: RunState, *, is_new: bool, on_wait: Callable[[str], None] = lambda _: None
    ) -> None:
        """Made by `create` or `reopen`."""
        self.path = path
        self.state = state
        self._is_new = is_new
        self._on_wait = on_wait
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, folders: Mapping[Key, str], use_ray: bool, cache: Path | None) -> RunFolder:
        """A folder for a new run of the jobs in `folders`."""
        named = {f"{key.namespace}/{key.name}": folder for key, folder in folders.items()}
        state = RunState(folders=named, use_ray=use_ray, cache=str(cache.absolute()) if cache else None)
        return cls(path.absolute(), state, is_new=True)

    @classmethod
    def reopen(cls, path: Path, on_wait: Callable[[str], None] = lambda _: None) -> RunFolder:
        """The folder of a run that was begun. Raises NoRun. What it holds is read when it is entered; `on_wait` is
        told why that takes time.
        """
        if not (path / STATE_FILE).is_file():
            raise NoRun(f"{path} holds no run to go on with; name a run's folder, such as runs/my-job/20250101-120000")
        return cls(path.absolute(), RunState(), is_new=False, on_wait=on_wait)

    @property
    def lock(self) -> int:
        """File descriptor; whoever holds it open keeps others out."""
        assert self._lock is not None, "the folder is entered first"
        return self._lock

    def __enter__(self) -> Self:
        """Take the folder. Raises RunFolderTaken, NoRun, or OSError when it cannot be used."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._take()
            if not self._is_new:
                self.state = _read(self.path / STATE_FILE)
            elif any((self.path / name).exists() for name in (*RUN_FILES, STATE_FILE)):
                raise RunFolderTaken(f"{self.path} holds a run already; name another folder")
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def of_job(self, key: Key) -> Path:
        """The folder with the files of this job's last attempt."""
        return self.path / self.state.folders[f"{key.namespace}/{key.name}"]

    def make_room(self, key: Key, attempt: int) -> Path:
        """The job's folder, free for the files of an attempt; those of the one before move aside."""
        folder = self.of_job(key)
        folder.mkdir(parents=True, exist_ok=True)
        name = str(folder.relative_to(self.path))
        before = self.state.attempts.get(name)
        if before is not None:
            aside = _free(folder / f"{_ATTEMPT}{before}")
            aside.mkdir()
            for file in list(folder.iterdir()):
                if file.name not in _OF_ALL_ATTEMPTS and not file.name.startswith(_ATTEMPT):
                    file.replace(aside / file.name)
        self.state.attempts[name] = attempt
        return folder

    def save(self) -> None:
        """Write state.json, whole or not at all."""
        unfinished = self.path / f".{STATE_FILE}"
        document = {"version": _VERSION, **vars(self.state)}
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path / STATE_FILE)

    def _take(self) -> None:
        """What is left of a run that was killed holds the lock too, for as long as it takes to end."""
        if self._try_lock():
            return
        if not self._is_new:
            self._on_wait("Waiting for what is left of the interrupted run to end")
        deadline = time.monotonic() + (0 if self._is_new else _LOCK_WAIT_SECONDS)
        while not self._try_lock():
            if time.monotonic() >= deadline:
                raise RunFolderTaken(f"{self.path} is in use by another finetune run; wait for its end")
            time.sleep(0.2)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def jobs_in(state: RunState) -> list[FineTuneJob]:
    """The jobs of the run, in the order in which they were given, as they stand."""
    documents = {
        f"{one['metadata']['namespace']}/{one['metadata']['name']}": one
        for one in state.objects
        if one["kind"] == "FineTuneJob"
    }
    return [FineTuneJob.model_validate(documents[name]) for name in state.folders]


def _free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that is not there: the same attempt may have been begun twice."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(one for one in itertools.chain([path], others) if not one.exists())


def _read(file: Path) -> RunState:
    try:
        document = json.loads(file.read_bytes())
        if document.pop("version") != _VERSION:
            raise NoRun(f"{file} was written by another version of finetune; go on with that one")
        return RunState(**document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, NoRun):
            raise
        raise NoRun(f"{file} is damaged ({error}); start a new run") from error
