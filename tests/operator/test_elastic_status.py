"""What a job's status and events say of a group of workers that is smaller than planned, or larger than it was."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.progress import Stage
from tests.operator.decide_factories import Cluster

ELASTIC: dict[str, Any] = {
    "checkpoint": {"everySteps": 10},
    "cluster.workers": {"replicas": 4, "minReplicas": 1},
    "training.globalBatchSize": 8,
}


@pytest.fixture
def cluster() -> Cluster:
    """A job whose first attempt has machines."""
    cluster = Cluster(ELASTIC)
    cluster.settle()
    return cluster.running().wait(60)


def trains(cluster: Cluster, world_size: int, step: int = 1) -> list[tuple[str, str]]:
    """A group of so many trains; the events of the pass that sees it."""
    cluster.wait(60).report(step=step, world_size=world_size)
    told = [(event.reason, event.message) for event in cluster.decide().events if event.reason.startswith("Workers")]
    cluster.settle()
    return told


def test_a_whole_group_is_nothing_to_hear_of(cluster: Cluster) -> None:
    assert trains(cluster, 4) == []
    assert cluster.status["progress"]["worldSize"] == cluster.status["resolved"]["worldSize"] == 4


def test_a_group_that_begins_with_fewer_is_told_once(cluster: Cluster) -> None:
    message = "Training goes on with 2 of 4 processes: there is no room for the others."
    assert trains(cluster, 2) == [("WorkersMissing", message)]
    assert trains(cluster, 2, step=2) == []
    assert cluster.status["progress"]["worldSize"] == 2
    assert cluster.status["resolved"]["worldSize"] == 4, "what was planned stays"


def test_a_group_that_loses_workers_and_gets_them_back_is_told_each_time(cluster: Cluster) -> None:
    trains(cluster, 4)
    cluster.wait(60).report(Stage.STARTING_WORKERS, message="Worker 1 died.").settle()
    assert cluster.status["progress"]["worldSize"] == 4, "of the last group that trained"
    assert [reason for reason, _ in trains(cluster, 1, step=11)] == ["WorkersMissing"]
    cluster.wait(60).report(Stage.STARTING_WORKERS, message="There is room.").settle()
    message = "Training goes on with all 4 processes: there is room again."
    assert trains(cluster, 4, step=21) == [("WorkersComplete", message)]
