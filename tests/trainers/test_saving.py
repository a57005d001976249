"""Saving while training goes on, by real trainers and writers: what slow storages and sudden deaths do to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_api.plan import RunPlan
from finetune_api.progress import Progress, Result
from finetune_trainers import launch
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.context import STOP_FILE, SingleProcessContext
from finetune_trainers.loop import Loop, LoopMemory
from finetune_trainers.methods.sft import Sft
from finetune_trainers.saving import VISIBLE_SECONDS, Checkpoints
from finetune_trainers.worker import load
from tests.cluster.processes import is_alive
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.test_killed_worker import training_workers

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

MARK = "FINETUNE_RUN_MARK"
WRITER = "finetune_trainers.checkpoint.writer"
SKIPPED = re.compile(r"No checkpoint of step (\d+) was made")
SOON = 300.0
"""Seconds that no test waits in full."""


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SOON
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.05)
    return found


def writers_of(mark: str) -> list[psutil.Process]:
    """Those that are at work. What started one is at the head of its session."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = WRITER in process.cmdline() and process.environ().get(MARK) == mark
            if is_ours and os.getsid(process.pid) != process.pid:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


@dataclass
class Trainer:
    """Runs in one folder, each in a process of its own."""

    world: SmallWorld
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def plan(self, changes: dict[str, Any], **checkpoint: Any) -> RunPlan:
        settings = {"everySteps": 50, "keepLast": 1000, **checkpoint}
        plan = self.world.plan({"training.microBatchSize": 2, "checkpoint": settings} | changes)
        assert plan.checkpoint is not None
        where = {"uri": f"file://{self.folder}/checkpoints"}
        return plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update=where)})

    def start(self, plan: RunPlan, name: str = "run") -> subprocess.Popen[bytes]:
        workdir = self.folder / name
        workdir.mkdir()
        (workdir / "plan.json").write_text(plan.model_dump_json(by_alias=True))
        arguments = ["--plan", str(workdir / "plan.json"), "--workdir", str(workdir), "--no-ray"]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "finetune_trainers", "run", *arguments],
            env=os.environ | {"FINETUNE_CACHE": str(self.world.cache), MARK: self.mark},
            start_new_session=True,
        )

    def paused_writer(self) -> psutil.Process:
        """As a storage that hangs."""
        writer: psutil.Process = until(lambda: writers_of(self.mark))[0]
        writer.suspend()
        return writer

    def reports(self, name: str = "run") -> list[Progress]:
        file = self.folder / name / "progress.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [Progress.model_validate_json(line) for line in lines if line.endswith("\n")]

    def said(self, name: str = "run") -> str:
        return "\n".join(report.message for report in self.reports(name) if report.message)

    def skipped(self) -> int | None:
        """The first step of which no checkpoint was made, for want of room."""
        found = SKIPPED.search(self.said())
        return int(found[1]) if found else None

    def step(self) -> int:
        """Of the last step that was logged; a report may leave out some."""
        file = self.folder / "run" / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return max((int(json.loads(line)["step"]) for line in lines if line.endswith("\n")), default=0)

    def newest(self) -> int:
        """The step of the newest checkpoint, of which every byte is verified."""
        found = find_newest(open_storage(f"file://{self.folder}/checkpoints"), deep=True)
        assert found.rejected == ()
        return found.manifest.id.step if found.manifest is not None else 0

    def steps(self) -> list[int]:
        storage = open_storage(f"file://{self.folder}/checkpoints")
        return sorted(checkpoint.step for checkpoint, listing in listed(storage).items() if listing.is_settled)


@pytest.fixture
def trainer(small_world: SmallWorld, tmp_path: Path) -> Iterator[Trainer]:
    made = Trainer(small_world, tmp_path)
    yield made
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == made.mark:
                process.kill()
        except psutil.Error:
            continue


ENDLESS = {"training.maxSteps": 100_000}


def test_a_trainer_that_is_killed_after_staging_loses_none_of_it(trainer: Trainer) -> None:
    """Its writer was stuck, with one checkpoint begun and another one waiting; a third was left out."""
    with trainer.start(trainer.plan(ENDLESS)) as process:
        writer = trainer.paused_writer()
        skipped = until(trainer.skipped)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert trainer.newest() < skipped - 50
    assert is_alive(writer)
    writer.resume()
    until(lambda: not is_alive(writer))
    assert trainer.newest() == skipped - 50
    plan = trainer.plan({"training.maxSteps": skipped + 1})
    assert trainer.world.train(plan, trainer.folder / "rest").result is Result.SUCCEEDED
    assert {report.resumed_from_step for report in trainer.reports("rest")} - {None} == {skipped - 50}


def test_a_training_that_waits_for_its_writer_leaves_nothing_out(trainer: Trainer) -> None:
    with trainer.start(trainer.plan({"training.maxSteps": 400}, whenBehind="wait")) as process:
        writer = trainer.paused_writer()
        before = trainer.newest()
        until(lambda: trainer.step() >= before + 150)
        writer.resume()
        assert process.wait() == 0
    assert trainer.steps() == list(range(50, 401, 50))
    assert trainer.skipped() is None


def test_a_writer_that_is_killed_is_told_and_the_next_checkpoint_is_written_by_another(trainer: Trainer) -> None:
    with trainer.start(trainer.plan(ENDLESS)) as process:
        writer = trainer.paused_writer()
        skipped = until(trainer.skipped)
        writer.kill()
        until(lambda: trainer.newest() > skipped)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    said = trainer.said()
    assert f"The checkpoint of step {skipped - 100} could not be saved, and training goes on" in said
    assert "the process that writes checkpoints has died" in said
    assert trainer.newest() == trainer.step()
    assert trainer.reports()[-2].save_failure is None


class FirstOfTwo(SingleProcessContext):
    """Rank 0 of two; the other one has nothing to say, and what it writes is written somewhere else."""

    world_size = 2

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, type(value)()]


def test_parts_that_lie_somewhere_else_are_not_waited_for_for_ever(trainer: Trainer) -> None:
    plan, workdir, now = trainer.plan({}), trainer.folder / "run", [0.0]
    context = FirstOfTwo(plan, workdir)
    prepared = trainer.world.prepare(plan, workdir)
    _, engine = load(plan, prepared, SingleProcessContext(plan, workdir))
    assert plan.checkpoint is not None
    checkpoints = Checkpoints(plan, plan.checkpoint, prepared, engine, context, workdir, clock=lambda: now[0])
    checkpoints.resume()
    checkpoints.after_step(50, checkpoints.votes(50), LoopMemory)
    until(lambda: not checkpoints.votes(51).writing)
    assert checkpoints.after_step(51, checkpoints.votes(51), LoopMemory).failure is None
    now[0] += VISIBLE_SECONDS
    checkpoints.after_step(52, checkpoints.votes(52), LoopMemory)
    until(lambda: checkpoints.votes(53).failed)
    told = checkpoints.after_step(53, checkpoints.votes(53), LoopMemory).failure
    assert told is not None
    assert "must be the same place on every machine" in told
    checkpoints.close()
    engine.close()
    assert trainer.newest() == 0


def test_word_of_a_preemption_saves_at_once_and_once(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = [None]
    log = Loop._log

    def hear_after_the_fifth(self: Loop, figures: dict[str, float]) -> None:
        log(self, figures)
        heard[0] = "a node will go" if self.result.step >= 5 else None

    monkeypatch.setattr(Loop, "_log", hear_after_the_fifth)
    monkeypatch.setattr(SingleProcessContext, "preemption", lambda self: heard[0])
    plan = trainer.plan({"training.maxSteps": 12}, everySteps=1000)
    assert trainer.world.train(plan, trainer.folder / "run").result is Result.SUCCEEDED
    assert trainer.steps() == [6]


def test_ray_leaves_word_of_a_preemption_where_it_is_looked_for() -> None:
    """It is not a public place; should it move, nothing is saved ahead, and nobody would notice."""
    from ray.train.v2._internal.execution.context import TrainContext
    from ray.train.v2._internal.execution.preemption import PreemptionContext

    assert "preemption_context" in {field.name for field in fields(TrainContext)}
    assert PreemptionContext().preemption_info is None


@pytest.mark.ray
def test_a_worker_of_ray_that_is_killed_loses_nothing_either(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray ends what its workers have started; a writer is out of its reach."""
    monkeypatch.setenv(MARK, trainer.mark)
    monkeypatch.setenv("SPT_NOENV", "1")
    workers = {"cluster.workers": {"replicas": 2, "cpus": 1}, "deepspeed.zeroStage": 2}
    plan, workdir = trainer.plan(ENDLESS | workers, everySteps=20), trainer.folder / "run"
    seen: dict[str, Any] = {}

    def kill() -> None:
        writers = until(lambda: found if len(found := writers_of(trainer.mark)) == 2 else None)
        for writer in writers:
            writer.suspend()
        seen["skipped"] = until(trainer.skipped)
        workers = list(training_workers())
        for worker in workers:
            with suppress(psutil.NoSuchProcess):  # Ray may be quicker: it ends the others when it misses the first
                worker.kill()
        psutil.wait_procs(workers, timeout=SOON)
        seen["outlived"] = all(is_alive(writer) for writer in writers)
        seen["before"] = trainer.steps()
        for writer in writers:
            writer.resume()
        until(lambda: not any(is_alive(writer) for writer in writers))
        seen["after"] = trainer.steps()
        (workdir / STOP_FILE).touch()  # Ray may have started others in the place of the workers

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    launch.run(plan, workdir, trainer.world.cache)
    killer.join(timeout=SOON)
    assert seen["outlived"]
    assert seen["skipped"] - 20 not in seen["before"]
    assert seen["skipped"] - 20 in seen["after"]
    assert trainer.newest() >= seen["skipped"] - 20


def test_a_metric_that_there_is_none_of_keeps_no_best_and_is_told_once(trainer: Trainer) -> None:
    best = {"metric": "rewrad", "mode": "max"}
    plan = trainer.plan({"training.maxSteps": 4}, everySteps=1, whenBehind="wait", keepBest=best)
    assert trainer.world.train(plan, trainer.folder / "run").result is Result.SUCCEEDED
    told = "spec.checkpoint.keepBest.metric: rewrad is no figure of this run so far"
    assert trainer.said().count(told) == 1
    assert "grad_norm" in trainer.said(), "it names what there is"
    plan = trainer.plan({"training.maxSteps": 4}, everySteps=1, whenBehind="wait", keepBest=best | {"metric": "loss"})
    trainer.world.train(plan, trainer.folder / "known")
    assert "keepBest" not in trainer.said("known")


def test_a_metric_that_an_evaluation_could_not_have_this_time_is_no_unknown_one(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when no answer got a reward."""
    found = [{"eval_loss": 2.0}]
    monkeypatch.setattr(Sft, "evaluate", lambda *_: found.pop() if found else {})
    data = {"data.eval": [{"source": (trainer.world.folder / "eval.jsonl").as_uri()}]}
    best = {"metric": "eval_loss", "mode": "min"}
    changes = {"training.maxSteps": 3, "training.evalEverySteps": 1} | data
    plan = trainer.plan(changes, everySteps=1, whenBehind="wait", keepBest=best)
    assert trainer.world.train(plan, trainer.folder / "run").result is Result.SUCCEEDED
    assert not found
    assert "keepBest" not in trainer.said()
