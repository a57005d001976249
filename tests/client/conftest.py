"""A complete job to change from, the command line in this process or in one of its own, and the fake trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from finetune_client import runner
from finetune_client.cli.app import app
from tests.factories import job_document, with_changes

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")
LAUNCHER = """
import sys
from finetune_client import runner
from finetune_client.cli import main
runner.TRAINERS = [sys.executable, {trainer!r}]
runner.NEEDED_PACKAGES = ()
main()
"""
JOB = job_document(
    {
        "model.source": "hf://org/tiny-8B",
        "data.train": [{"source": "hf://org/rows"}],
        "data.eval": [{"source": "hf://org/rows", "split": "test"}],
        "training": {"maxSteps": 5, "globalBatchSize": 8},
    },
    name="tiny",
)
"""A job whose sources need not be on this machine; the fake trainer reads none."""


@dataclass(frozen=True)
class Finished:
    """How the command ended and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


Finetune = Callable[..., Finished]
WriteJob = Callable[..., Path]


@pytest.fixture
def write_job(tmp_path: Path) -> WriteJob:
    """Writes the job, with changes by dotted path from its root, to a file."""

    def write(changes: dict[str, Any] | None = None, name: str = "job.yaml") -> Path:
        file = tmp_path / name
        file.write_text(yaml.safe_dump(with_changes(JOB, changes or {}), sort_keys=False))
        return file

    return write


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """The command line in this process, with the fake trainer; `fake` chooses what that one does."""
    monkeypatch.setattr(runner, "TRAINERS", [sys.executable, str(FAKE_TRAINER)])
    monkeypatch.setattr(runner, "NEEDED_PACKAGES", ())

    def run(*arguments: str | Path, fake: str = "") -> Finished:
        monkeypatch.setenv("FAKE_TRAINER", fake)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="finetune")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Finished(result.exit_code, result.stdout, result.stderr)

    return run


class Started:
    """The command line in a process of its own, so that signals can be sent to it."""

    def __init__(self, arguments: list[str], fake: str, folder: Path) -> None:
        self.workdir = folder / "run"
        launcher = LAUNCHER.format(trainer=str(FAKE_TRAINER))
        self.process = subprocess.Popen(
            [sys.executable, "-c", launcher, *arguments, "--workdir", str(self.workdir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"FAKE_TRAINER": fake},
            start_new_session=True,
        )

    def wait_for(self, text: str) -> None:
        """Wait until the trainer has reported `text`."""
        reports = self.workdir / "progress.jsonl"
        wait_until(lambda: reports.exists() and text in reports.read_text())

    def finish(self) -> Finished:
        stdout, stderr = self.process.communicate(timeout=300)
        return Finished(self.process.returncode, stdout, stderr)

    def trainer(self) -> psutil.Process:
        return next(p for p in psutil.Process(self.process.pid).children() if "fake_trainer" in " ".join(p.cmdline()))

    def children(self) -> list[int]:
        """The processes that the fake trainer started, by pid."""
        found: list[int] = json.loads((self.workdir / "children.json").read_text())
        return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(*arguments: str | Path, fake: str = "") -> Started:
        started.append(Started([str(argument) for argument in arguments], fake, tmp_path))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:  # the test failed on the way
            for child in psutil.Process(one.process.pid).children(recursive=True):
                child.kill()
            one.process.kill()
            one.process.communicate()


def wait_until(holds: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
