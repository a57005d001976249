"""Trainings whose processes are killed with SIGKILL again and again: they end as if nobody had, to the bit.

Killed is the trainer, the process that writes its checkpoints, or both at once; moments and victims are drawn from a
seed. In each run a tiny model, PPO and a few kills; with FINETUNE_LONG=1 the real model of 135M parameters, SFT and
PPO, and twenty kills.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune_api.plan import RunPlan
from tests.bench.common import cache_folder, model_folder
from tests.trainers.conftest import SmallWorld
from tests.trainers.factories import tiny_plan
from tests.trainers.online.online_world import write_prompts

pytestmark = pytest.mark.training

LONG = bool(os.environ.get("FINETUNE_LONG"))
NUM_KILLS = 20 if LONG else 4
ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL = 90, 8
ROLLOUTS: dict[str, Any] = {
    "maxSeqLength": 64,
    "sampling": {"maxNewTokens": 12},
    "rewards": [{"function": {"call": "tests.trainers.online.scores:many_letters", "settings": {"letter": "e"}}}],
    "passes": 2,
    "miniBatches": 2,
    "kl": {"coefficient": 0.1, "target": 0.5, "horizon": 100},
    "normalizeRewards": True,
}


@dataclass
class Training:
    """Attempts of one plan, each in a process and a folder of its own, with one place for checkpoints."""

    folder: Path
    plan: RunPlan
    cache: Path
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    num_attempts: int = 0

    def begin(self) -> subprocess.Popen[bytes]:
        self.num_attempts += 1
        self.workdir.mkdir(parents=True)
        given = self.workdir / "given.json"
        given.write_text(self.plan.model_dump_json(by_alias=True))
        command = [sys.executable, "-m", "finetune_trainers", "run", "--no-ray", "--plan", str(given)]
        paths = os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
        environment = {"FINETUNE_ATTEMPT": str(self.num_attempts), "FINETUNE_CACHE": str(self.cache)}
        with (self.workdir / "output").open("wb") as output:
            return subprocess.Popen(
                [*command, "--workdir", str(self.workdir)],
                cwd=self.workdir,
                env=os.environ | environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
            )

    @property
    def workdir(self) -> Path:
        """Of the present attempt."""
        return self.folder / f"attempt-{self.num_attempts}"

    def goes_on_to(self, process: subprocess.Popen[bytes], num_steps: int) -> bool:
        """Waits for so many more steps -> False when the training ends before that."""
        wanted = len(steps_of(self.workdir)) + num_steps
        while len(steps_of(self.workdir)) < wanted:
            if process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def writers(self) -> Iterator[psutil.Process]:
        """Of the present attempt: nobody's children, but they work where it does."""
        for process in psutil.process_iter(["cmdline", "cwd"]):
            is_writer = "finetune_trainers.checkpoint.writer" in (process.info["cmdline"] or [])
            if is_writer and process.info["cwd"] == str(self.workdir):
                yield process

    def kill(self, process: subprocess.Popen[bytes], victim: str) -> None:
        writers = list(self.writers())
        for one in writers if victim != "trainer" else ():
            with suppress(psutil.NoSuchProcess):  # it had nothing more to do
                one.kill()
        if victim != "writer":
            process.kill()
            process.wait()

    def under_kills(self) -> int:
        """The whole training -> how many kills there were."""
        process, kills = self.begin(), 0
        while kills < NUM_KILLS:
            if not self.goes_on_to(process, self.rng.randint(1, 2 * INTERVAL)):
                break
            time.sleep(self.rng.uniform(0, 0.1))
            victim = self.rng.choice(["trainer", "trainer", "writer", "both"])
            self.kill(process, victim)
            kills += 1
            if victim != "writer":
                process = self.begin()
        assert process.wait() == 0, (self.workdir / "output").read_text()
        return kills


def steps_of(workdir: Path) -> dict[int, dict[str, float]]:
    """Figures by step, of an attempt that may be writing them or may have been killed while it did."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = {}
    for line in lines:
        try:
            one: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in one["metrics"]:
            found[one["step"]] = {name: one["metrics"][name] for name in ("loss", "grad_norm")}
    return found


def artifact_of(workdir: Path) -> dict[str, Tensor]:
    files = (workdir / "artifact").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(params=["sft", "ppo"] if LONG else ["ppo"])
def training(request: pytest.FixtureRequest, small_world: SmallWorld, tmp_path: Path) -> Training:
    """PPO is killed wherever it is: when it writes, scores, asks its models, updates, or saves."""
    training = {"maxSteps": STEPS, "globalBatchSize": 8, "microBatchSize": 2, "learningRate": 1e-3}
    changes: dict[str, Any] = {"training": training | {"precision": "fp32"}, "checkpoint": {"everySteps": INTERVAL}}
    model, cache, rows = small_world.model, small_world.cache, small_world.folder / "rows.jsonl"
    if request.param == "ppo":
        rows = write_prompts(tmp_path / "prompts.jsonl", 40)
        changes |= {"method": {"ppo": ROLLOUTS}}
    if LONG:
        model, cache = model_folder(), cache_folder()
        changes["training"] |= {"globalBatchSize": 2, "microBatchSize": 1}
        changes["tuning"] = {"lora": {"rank": 8}}
    return Training(tmp_path, tiny_plan(model, rows, changes), cache)


def at(training: Training, place: str) -> Training:
    assert training.plan.checkpoint is not None
    checkpoint = training.plan.checkpoint.model_copy(update={"uri": f"file://{training.folder / place}/checkpoints"})
    plan = training.plan.model_copy(update={"checkpoint": checkpoint})
    return Training(training.folder / place, plan, training.cache)


def test_a_training_that_is_killed_again_and_again_ends_as_if_it_had_not_been(training: Training) -> None:
    whole, killed = at(training, "whole"), at(training, "killed")
    assert whole.begin().wait() == 0, (whole.workdir / "output").read_text()
    assert killed.under_kills() == NUM_KILLS
    curve, seen = steps_of(whole.workdir), defaultdict(list)
    for attempt in killed.folder.glob("attempt-*"):
        for step, figures in steps_of(attempt).items():
            seen[step].append(figures)
    assert sorted(seen) == sorted(curve)
    assert {step: figures for step, found in seen.items() for figures in found if figures != curve[step]} == {}
    wanted = artifact_of(whole.workdir)
    assert wanted
    for name, tensor in artifact_of(killed.workdir).items():
        assert torch.equal(tensor, wanted[name]), name
    redone = sum(len(found) - 1 for found in seen.values())
    assert redone <= (killed.num_attempts - 1) * 3 * INTERVAL, "an attempt loses no more than what was not yet durable"
