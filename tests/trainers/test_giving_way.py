"""A group of fewer workers gives way to a larger one: when there is room, after a while, and with all of it saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_api.plan import ElasticPlan, RunPlan
from finetune_trainers import worker
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.loop import LoopResult
from finetune_trainers.saving import Checkpoints
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

STEPS = 6


class WithRoom(SingleProcessContext):
    """A group of one that hears of room after the first look."""

    looks = 0

    def has_room(self) -> bool:
        self.looks += 1
        return self.looks > 1


def elastic(world: SmallWorld, resize_after_seconds: float) -> RunPlan:
    """Saves at no step of its own accord."""
    plan = world.plan({"training.maxSteps": STEPS, "checkpoint": {"everySteps": 1000}})
    fewer = ElasticPlan(replicas=[1], resize_after_seconds=resize_after_seconds)
    workers = plan.workers.model_copy(update={"elastic": fewer})
    return plan.model_copy(update={"workers": workers})


def trained(world: SmallWorld, plan: RunPlan, workdir: Path) -> LoopResult:
    return worker.run(plan, world.prepare(plan, workdir), WithRoom(plan, workdir), workdir).training


def newest(workdir: Path) -> int | None:
    """Steps in the newest checkpoint, of which every byte is verified."""
    found = find_newest(open_storage(f"file://{workdir}/checkpoints"), deep=True).manifest
    return found.id.step if found is not None else None


def test_it_ends_with_a_whole_checkpoint_of_its_last_step_and_writes_no_model(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    training = trained(small_world, elastic(small_world, 0), tmp_path)
    assert (training.gives_way, training.cancelled, training.step) == (True, True, 2)
    assert newest(tmp_path) == 2
    assert not (tmp_path / "artifact").exists()


def test_it_does_not_before_its_time(small_world: SmallWorld, tmp_path: Path) -> None:
    training = trained(small_world, elastic(small_world, 10_000), tmp_path)
    assert (training.gives_way, training.cancelled, training.step) == (False, False, STEPS)


def test_it_goes_on_where_no_checkpoint_came_of_it(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "_commit", lambda self, step, memory: ["no space"])
    training = trained(small_world, elastic(small_world, 0), tmp_path)
    assert (training.gives_way, training.cancelled, training.step) == (False, False, STEPS)
    assert newest(tmp_path) is None


def test_it_does_not_after_the_last_step(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = elastic(small_world, 0)
    plan = plan.model_copy(update={"optimization": plan.optimization.model_copy(update={"max_steps": 2})})
    training = trained(small_world, plan, tmp_path)
    assert (training.gives_way, training.cancelled, training.step) == (False, False, 2)
