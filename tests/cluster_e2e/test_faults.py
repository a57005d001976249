"""What happens to a job when pods and nodes are lost under it, for real: it goes on from its last checkpoint."""

from __future__ import annotations

import copy
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
STEPS = 3000


@pytest.fixture
def long(tiny: dict[str, Any]) -> dict[str, Any]:
    """A job that trains for a minute or two and saves every hundred steps."""
    spec = copy.deepcopy({**tiny, **LONG})
    spec["training"]["maxSteps"] = STEPS
    return spec


def saved(team: World, job: str) -> int:
    return int((team.status(job).get("checkpoint") or {}).get("step") or 0)


def goes_on(team: World, job: str, seen: int) -> None:
    """A second attempt began at a checkpoint no older than the one at step `seen`, and ends the job."""
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed all the same", seconds=500)
    first, second = team.status(job)["attempts"]
    assert second["resumedFromStep"] >= seen
    assert second["resumedFromStep"] % EVERY == 0 or second["resumedFromStep"] >= first["step"]
    assert team.status(job)["progress"]["step"] == STEPS


def test_a_job_whose_worker_pod_is_deleted_goes_on_from_its_checkpoint(
    team: World, long: dict[str, Any], submit: Submit
) -> None:
    job = submit("deleted", long)
    team.wait(job, lambda: saved(team, job) > 0, "a first checkpoint")
    seen = saved(team, job)
    team.kubectl("delete", "pod", team.pods(job, "worker")[0]["metadata"]["name"], "--wait=false")
    goes_on(team, job, seen)
    first, _ = team.status(job)["attempts"]
    assert first["outcome"] == "Preempted"
    assert first["action"] == "RetryFree"
    assert team.status(job)["restarts"] == 0


def test_a_job_that_loses_a_node_goes_on_with_what_is_left(team: World, long: dict[str, Any], submit: Submit) -> None:
    job = submit("lost", long)
    team.wait(job, lambda: saved(team, job) > 0, "a first checkpoint")
    seen = saved(team, job)
    lost = NODES[1]
    assert any(pod["spec"]["nodeName"] == lost.name for pod in team.pods(job))
    team.cluster.lose(lost)
    try:
        team.wait(job, lambda: len(team.status(job)["attempts"]) == 2, "another attempt", seconds=300)
        goes_on(team, job, seen)
    finally:
        team.cluster.restore(lost)
    first, _ = team.status(job)["attempts"]
    assert first["outcome"] in ("NodeLost", "Preempted")


def test_an_image_that_does_not_exist_is_named_in_the_status(team: World, tiny: dict[str, Any], submit: Submit) -> None:
    image = "ghcr.io/finetune-operator/no-such-image:1"
    job = submit("imageless", {**tiny, "cluster": {"image": image}})

    def told() -> str:
        conditions = {one["type"]: one for one in team.status(job).get("conditions", [])}
        return str(conditions.get("ClusterReady", {}).get("message", ""))

    team.wait(job, lambda: "waits: " in told() and image in told(), "the image to be named", seconds=60)
    assert image in team.finetune("get", job).stdout
