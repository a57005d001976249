"""What happens to a job when pods and nodes are lost under it, for real: it goes on from its last checkpoint."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes.layout import NODES
from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import World

pytestmark = pytest.mark.cluster

EVERY = 100
SPREAD = {"topology": {"mode": "spread", "key": "kubernetes.io/hostname"}}
LONG = {
    "cluster": {"workers": {"replicas": 2}},
    "deepspeed": {"zeroStage": 2},
    "scheduling": SPREAD,
    "checkpoint": {"everySteps": EVERY},
    "failurePolicy": {"backoff": {"initialSeconds": 1, "maxSeconds": 5}},
}
STEPS = 1500


@pytest.fixture
def long(tiny: dict[str, Any]) -> dict[str, Any]:
    """A job that trains for a minute or two and saves every hundred steps."""
    spec = copy.deepcopy({**tiny, **LONG})
    spec["training"]["maxSteps"] = STEPS
    return spec


def saved(team: World, job: str) -> int:
    return int((team.status(job).get("checkpoint") or {}).get("step") or 0)


def run_folder(team: World, job: str) -> Path:
    return team.folder / "runs" / team.namespace / job / "attempt-1"


def steps(team: World, job: str) -> list[int]:
    """Every optimizer step of the run as its metrics tell, in order."""
    lines = (run_folder(team, job) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def trainings(team: World, job: str) -> int:
    """How often workers began to train, as the run's reports tell."""
    lines = (run_folder(team, job) / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    return [stage for stage, _ in itertools.groupby(stages)].count("Training")


def test_a_job_whose_worker_pod_is_deleted_goes_on_from_its_checkpoint(
    team: World, long: dict[str, Any], submit: Submit
) -> None:
    """KubeRay replaces the pod, and the driver begins a new group of workers in the same Ray: no attempt is lost."""
    job = submit("deleted", long)
    team.wait(job, lambda: saved(team, job) > 0, "a first checkpoint")
    before = {pod["metadata"]["name"] for pod in team.pods(job, "worker")}
    team.kubectl("delete", "pod", min(before), "--wait=false")
    team.wait(job, lambda: {pod["metadata"]["name"] for pod in team.pods(job, "worker")} - before, "another pod")
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed all the same", seconds=600)
    status = team.status(job)
    assert status["progress"]["step"] == STEPS
    assert len(status["attempts"]) == 1
    assert status["restarts"] == 0
    assert trainings(team, job) == 2
    assert steps(team, job) == list(range(1, STEPS + 1))


def test_a_job_that_loses_a_node_goes_on_with_what_is_left(team: World, long: dict[str, Any], submit: Submit) -> None:
    job = submit("lost", long)
    team.wait(job, lambda: saved(team, job) > 0, "a first checkpoint")
    seen, lost = saved(team, job), NODES[1]
    assert any(pod["spec"]["nodeName"] == lost.name for pod in team.pods(job, "worker"))
    team.cluster.lose(lost)
    try:
        team.wait(job, lambda: saved(team, job) >= seen + 3 * EVERY, "training to go on", seconds=600)
        assert {pod["spec"].get("nodeName") for pod in team.pods(job, "worker") if is_running(pod)} == {"node-1"}
    finally:
        team.cluster.restore(lost)


def is_running(pod: dict[str, Any]) -> bool:
    return pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]


def test_an_image_that_does_not_exist_is_named_in_the_status(team: World, tiny: dict[str, Any], submit: Submit) -> None:
    image = "ghcr.io/finetune-operator/no-such-image:1"
    job = submit("imageless", {**tiny, "cluster": {"image": image}})

    def told() -> str:
        conditions = {one["type"]: one for one in team.status(job).get("conditions", [])}
        return str(conditions.get("ClusterReady", {}).get("message", ""))

    team.wait(job, lambda: "waits: " in told() and image in told(), "the image to be named", seconds=60)
    assert image in team.finetune("get", job).stdout
