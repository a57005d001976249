"""What an online method is doing is seen from outside, and what each part of it takes."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import OnlineWorld

# PEFT and we ask transformers by names that are going to change
pytestmark = WHEN_TRAINING


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("phases"))


def test_each_part_of_an_iteration_is_told_with_who_does_it_and_what_it_took(
    world: OnlineWorld, tmp_path: Path
) -> None:
    changes = {"training.maxSteps": 8, "checkpoint": {"everySteps": 4}, "training.evalEverySteps": 8}
    world.train(world.plan("ppo", changes), tmp_path)
    reports: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()
    ]
    told = [(one["stage"], one["phase"], one["role"]) for one in reports if one.get("phase") not in (None, "sync")]
    writing = [("generate", "policy"), ("score", "reward many_letters")]
    learning = [("judge", "policy, reference, critic"), ("train", "policy and critic")]
    saving = [("judge", "policy, reference"), ("save", "the writer of checkpoints")]
    iteration = [*writing, *learning, *saving]
    for stage, order, times in (("Training", iteration, 2), ("Evaluating", writing, 3)):
        assert [key for key, _ in groupby(part for of, *part in told if of == stage)] == [
            list(one) for one in order
        ] * times
    steps = [one["step"] for one in reports if one["stage"] in ("Training", "Evaluating")]
    assert steps == sorted(steps), "a report of a part does not forget how far training has come"
    for phase in ("sync", "generate", "score", "judge", "train"):
        took = world.curve(tmp_path, f"seconds/{phase}")
        assert took
        assert min(took) > 0
