"""A real training of which something hangs: what it said last names the part and who was at work, and so does the
status of the job that the operator gives up. How long that is waited for is told by a clock that is passed in.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_trainers.progress import PROGRESS_FILE, last_report
from tests.operator.decide_factories import Cluster
from tests.trainers.dying import Death, begin
from tests.trainers.online.online_world import METHODS, OnlineWorld

pytestmark = pytest.mark.training

HANGS = {"function": {"call": "tests.trainers.online.scores:never_comes_back", "timeoutSeconds": 3600}}


@pytest.mark.parametrize(
    ("rewards", "place", "wanted"),
    [
        ([HANGS], None, "Training: score (reward never_comes_back)"),
        (None, "the policy writes", "Training: generate (policy)"),
        (None, "models are asked", "Training: judge (policy, reference, critic)"),
        (None, "the critic's loss is known", "Training: train (policy and critic)"),
        (None, "weights are to be taken over", "Training: sync (policy)"),
    ],
    ids=["a reward", "the policy", "the reference", "the critic", "the engine"],
)
def test_a_job_whose_training_hangs_says_in_which_part_and_at_whom(
    rewards: Any, place: str | None, wanted: str, tmp_path: Path
) -> None:
    online = OnlineWorld.at(tmp_path / "world")
    settings = METHODS["ppo"]["ppo"] | ({"rewards": rewards} if rewards else {})
    plan = online.plan("ppo", {"method": {"ppo": settings}, "training.maxSteps": 8}, evaluated=False)
    mark = tmp_path / "mark"
    report = tmp_path / "run" / PROGRESS_FILE
    death = Death(place, iteration=1, mark=mark, hangs=True) if place else None
    [training] = begin(plan, tmp_path / "run", online.world.cache, 1, death)
    try:
        while not (mark.exists() if place else phase_of(report) == "score"):
            assert training.is_alive(), (tmp_path / "run" / "output-0").read_text()
            time.sleep(0.05)
        said = last_report(report)
    finally:
        for child in psutil.Process(training.pid).children(recursive=True):
            child.kill()  # a function that sleeps does not see that nobody waits for it
        training.kill()
        training.join()

    assert said is not None
    cluster = Cluster({"failurePolicy": {"hangTimeoutSeconds": 300}})
    cluster.settle()
    cluster.running().report(said.stage, step=said.step, phase=said.phase, role=said.role).settle()
    cluster.wait(300).settle()
    assert cluster.attempt["outcome"] == "Hang"
    assert cluster.attempt["message"].endswith(f"The last report is of {wanted}.")


def phase_of(file: Path) -> str | None:
    said = last_report(file)
    return None if said is None else said.phase
