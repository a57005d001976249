"""A worker that is killed under Ray Train. Without checkpoints the run ends with a failure that names it; with them
other workers go on. Nothing is left running.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_api.failures import FailureClass
from finetune_api.progress import Outcome, Progress, Result
from finetune_trainers import launch
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.ray, *WHEN_TRAINING]

STEPS = 100_000
"""More than can be made before the kill."""


def training_workers() -> Iterator[psutil.Process]:
    """The processes of Ray Train's group below this one."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                yield process
        except psutil.Error:
            continue  # gone in between


def names_below() -> list[str]:
    """Titles of the processes below this one, as Ray sets them."""
    names = []
    for process in psutil.Process().children(recursive=True):
        try:
            names.append(" ".join(process.cmdline()).strip())
        except psutil.Error:
            continue
    return names


class Killer(threading.Thread):
    """Kills one worker as soon as a text stands in a file."""

    def __init__(self, file: Path, text: str) -> None:
        super().__init__(daemon=True)
        self._file, self._text = file, text
        self.killed: int | None = None
        self.idle: list[str] = []
        """Processes that Ray had started and that did nothing then."""

    def run(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if self._file.exists() and self._text in self._file.read_text():
                victim = max(training_workers(), key=lambda process: process.pid)
                self.killed = victim.pid
                self.idle = [name for name in names_below() if name == "ray::IDLE"]
                victim.kill()
                return
            time.sleep(0.1)


@dataclass(frozen=True)
class Ended:
    """A run whose worker was killed."""

    outcome: Outcome
    killer: Killer
    workdir: Path


def run_with_a_kill(world: SmallWorld, workdir: Path, changes: dict[str, Any], killer: Killer) -> Ended:
    """Two workers, of which one is killed."""
    two = {"deepspeed.zeroStage": 2, "cluster.workers": {"replicas": 2, "cpus": 1}}
    killer.start()
    outcome = launch.run(world.plan(two | changes), workdir, world.cache)
    killer.join(timeout=10)
    return Ended(outcome, killer, workdir)


@pytest.fixture(scope="module")
def ended(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    workdir = tmp_path_factory.mktemp("killed")
    changes = {"training.maxSteps": STEPS, "training.globalBatchSize": 4}
    has_made_a_step = Killer(workdir / "metrics.jsonl", '"grad_norm"')
    return run_with_a_kill(small_world, workdir, changes, has_made_a_step)


def test_the_run_fails_and_says_that_a_worker_died(ended: Ended) -> None:
    outcome = ended.outcome
    assert ended.killer.killed is not None
    assert outcome.result is Result.FAILED
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.UNKNOWN
    assert "died without saying why" in outcome.failure.message


def test_no_worker_and_no_daemon_of_rays_is_left(ended: Ended) -> None:
    left = [process.name() for process in psutil.Process().children(recursive=True) if process.is_running()]
    assert [name for name in left if "ray" in name.lower() or name in ("gcs_server", "raylet")] == []


def test_the_processes_that_were_started_ahead_are_the_ones_that_train(ended: Ended) -> None:
    """A shortcut through Ray's internals, which another version of Ray may close without a word: they would idle."""
    assert ended.killer.idle == []


@pytest.fixture(scope="module")
def survived(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    workdir = tmp_path_factory.mktemp("survived")
    waiting = {"everySteps": 5, "whenBehind": "wait"}  # or a starved writer might have none whole before the last step
    elastic = {"replicas": 2, "minReplicas": 1, "cpus": 1}  # on one machine all are there again at once
    training = {"training.maxSteps": 100, "training.globalBatchSize": 16}
    changes = training | {"checkpoint": waiting, "cluster.workers": elastic}
    has_a_whole_checkpoint = Killer(workdir / "progress.jsonl", '"savedAt"')
    return run_with_a_kill(small_world, workdir, changes, has_a_whole_checkpoint)


def test_a_training_that_saves_goes_on_with_other_workers(survived: Ended) -> None:
    assert survived.killer.killed is not None
    assert survived.outcome.failure is None
    assert survived.outcome.step == 100
    reports = (survived.workdir / "progress.jsonl").read_text()
    assert "Other workers start, and go on from the newest checkpoint." in reports
    told = [Progress.model_validate_json(line) for line in reports.splitlines()]
    assert max(one.resumed_from_step for one in told if one.resumed_from_step is not None) >= 5
    assert {one.world_size for one in told if one.world_size is not None} == {2}
