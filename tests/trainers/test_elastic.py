"""A training that may go on with fewer workers: it loses a node, goes on without it, and grows when it is back."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from finetune_api.progress import Outcome, Progress, Result, Stage
from finetune_trainers import launch
from finetune_trainers.context import STOP_FILE
from finetune_trainers.ray_workers import OWN_PODS
from tests.cluster.processes import wait_until
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.ray_nodes import ray_nodes

pytestmark = [pytest.mark.ray, *WHEN_TRAINING]

SOON = 300.0
"""Seconds that no test waits in full."""
WORKERS = {"replicas": 2, "minReplicas": 1, "cpus": 1, "resizeAfterSeconds": 10}
ELASTIC = {
    "deepspeed.zeroStage": 2,
    "cluster.workers": WORKERS,
    "checkpoint": {"everySteps": 5, "whenBehind": "wait"},
    "training.maxSteps": 100_000,
    "training.globalBatchSize": 4,
    "training.schedule": "constant",  # a rate that does not follow from the number of steps
    "training.warmupFraction": 0,
}
COMPARED = 60
"""Steps: the node is lost after ten or so. Later, sums in another order have made another model of it."""


@dataclass(frozen=True)
class Told:
    """What a run has reported."""

    outcome: Outcome
    reports: list[Progress]
    losses: list[tuple[int, float]]
    """Every step that was made, in the order in which it was, with its loss."""
    left: list[str]
    """Names of actors that are there when the run is over."""


def reports_of(workdir: Path) -> list[Progress]:
    file = workdir / "progress.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [Progress.model_validate_json(line) for line in lines if line.endswith("\n")]


def losses_of(workdir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["metrics"]["loss"]) for line in lines if "loss" in line["metrics"]]


def named_actors(address: str) -> list[str]:
    """Of all that anybody has started in a Ray."""
    import ray

    with ray.init(address, log_to_driver=False, logging_level=logging.ERROR):
        return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


@pytest.fixture(scope="module")
def told(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Told:
    workdir = tmp_path_factory.mktemp("elastic")

    def trains_with(world_size: int, after: int = 0) -> bool:
        """Reported after so many reports, with a whole checkpoint."""
        return any(one.world_size == world_size and one.checkpoint for one in reports_of(workdir)[after:])

    def has_made_steps() -> bool:
        last = reports_of(workdir)[-1]
        return last.world_size == 2 and last.step > max(COMPARED, last.resumed_from_step or 0) + 3

    with ray_nodes(tmp_path_factory.mktemp("nodes")) as ray, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray.address)
        patch.setenv(OWN_PODS, "elastic-progress")
        ray.add("first")
        second = ray.add("second")
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(launch.run, small_world.plan(ELASTIC), workdir, small_world.cache)
            try:
                wait_until(lambda: running.done() or trains_with(2), "two workers", seconds=SOON)
                second.lose()
                wait_until(lambda: running.done() or trains_with(1), "one worker", seconds=SOON)
                num_reports = len(reports_of(workdir))
                ray.add("third")
                wait_until(lambda: running.done() or trains_with(2, num_reports), "two again", seconds=SOON)
                wait_until(lambda: running.done() or has_made_steps(), "their steps", seconds=SOON)
            finally:
                (workdir / STOP_FILE).touch()
            outcome = running.result()
        left = named_actors(ray.address)
    return Told(outcome, reports_of(workdir), losses_of(workdir), left)


@pytest.mark.parametrize("seconds", [1799, 1], ids=["for all workers", "for the least of them"])
def test_a_run_that_waits_for_room_ends_when_it_is_asked_to(
    small_world: SmallWorld, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, seconds: int
) -> None:
    with (
        ray_nodes(tmp_path_factory.mktemp("nodes")) as ray,
        pytest.MonkeyPatch.context() as patch,
        ThreadPoolExecutor(1) as pool,
    ):
        patch.setenv("RAY_ADDRESS", ray.address)
        plan = small_world.plan(ELASTIC | {"cluster.workers": {**WORKERS, "resizeAfterSeconds": seconds}})
        running = pool.submit(launch.run, plan, tmp_path, small_world.cache)
        try:
            wait_until(
                lambda: any(one.stage is Stage.STARTING_WORKERS for one in reports_of(tmp_path)),
                "the workers to be waited for",
                seconds=SOON,
            )
        finally:
            (tmp_path / STOP_FILE).touch()
        assert running.result(SOON).result is Result.CANCELLED


def going_back(steps: list[int]) -> list[tuple[int, int]]:
    """Where a step does not follow the one before it."""
    return [(before, step) for before, step in pairwise(steps) if step != before + 1]


def test_training_goes_on_with_one_worker_and_with_two_again(told: Told) -> None:
    assert told.outcome.result is Result.CANCELLED, told.outcome.failure
    sizes = [one.world_size for one in told.reports if one.world_size is not None]
    assert [size for size, before in zip(sizes, [None, *sizes], strict=False) if size != before] == [2, 1, 2]


def test_it_is_said_why_there_are_fewer_and_why_there_are_more(told: Told) -> None:
    said = [one.message or "" for one in told.reports]
    assert any(one.startswith("Training goes on with 1 of 2 workers: there is no room for more") for one in said)
    assert "All is saved, and there is room for 2 workers instead of 1." in said


def test_a_lost_node_costs_the_steps_since_the_checkpoint_and_growing_costs_none(told: Told) -> None:
    steps = [step for step, _ in told.losses]
    begun = {one.resumed_from_step for one in told.reports if one.resumed_from_step is not None}
    assert steps[0] == 1
    assert len(begun) >= 2, "after the loss, and after growing"
    for last, step in (back := going_back(steps)):
        assert step <= last, "none is left out"
        assert step - 1 in begun
    assert len(back) <= 1, "for the lost node alone"


def test_every_step_learns_what_it_learns_when_nobody_disturbs_it(
    told: Told, small_world: SmallWorld, tmp_path: Path
) -> None:
    one = {"cluster.workers": {"replicas": 1, "cpus": 1}, "training.maxSteps": COMPARED}
    outcome = small_world.train(small_world.plan(ELASTIC | one), tmp_path)
    assert outcome.result is Result.SUCCEEDED, outcome.failure
    undisturbed = dict(losses_of(tmp_path))
    compared = [(step, loss) for step, loss in told.losses if step <= COMPARED]
    assert max(step for step, _ in compared) == COMPARED
    for step, loss in compared:
        assert loss == pytest.approx(undisturbed[step], rel=1e-3), step


def test_a_ray_of_its_own_pods_is_left_without_an_actor_that_its_head_would_wait_for(told: Told) -> None:
    assert told.left == []
