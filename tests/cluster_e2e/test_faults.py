"""What happens to a job when pods and nodes are lost under it, for real: it goes on from its last checkpoint."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from tests.cluster.nodes.cluster import Cluster
from tests.cluster.nodes.layout import NODES
from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import NAMESPACE, World

pytestmark = pytest.mark.cluster

EVERY = 100
MOST_LOST = 2 * EVERY
"""Steps since the newest checkpoint: an interval, and those that are made while the next one is being written."""
JOB = "finetune-operator.io/job"
SPREAD = {"topology": {"mode": "spread", "key": "kubernetes.io/hostname"}}
LONG = {
    "cluster": {"workers": {"replicas": 2}},
    "deepspeed": {"zeroStage": 2},
    "scheduling": SPREAD,
    "checkpoint": {"everySteps": EVERY},
    "failurePolicy": {"backoff": {"initialSeconds": 1, "maxSeconds": 5}},
}
STEPS = 1500
DRAINED_STEPS = 6000
"""More than can be made in the grace period of a pod."""
KILL_TRAINER = """
import psutil
trainers = [one for one in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in str(one.info["cmdline"])]
trainers[0].kill()
print(trainers[0].pid)
"""

AT_ONCE = """
import mmap
from pathlib import Path
group = Path("/sys/fs/cgroup")
if (group / "memory.max").exists():
    limit, programs = group / "memory.max", "anon"
else:
    limit, programs = group / "memory/memory.limit_in_bytes", "total_rss"
used = int(dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())[programs])
more = int(limit.read_text()) - used + (256 << 20)
mmap.mmap(-1, more, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
"""
"""More memory than the container has left: the kernel kills, unless Ray looks just then and is quicker."""
BY_AND_BY = """
import psutil, time
(trainer,) = [one for one in psutil.process_iter() if " ".join(one.cmdline()).startswith("ray::RayTrainWorker")]
taken, until = [], time.monotonic() + 120
while trainer.is_running() and trainer.status() != "zombie" and time.monotonic() < until:
    taken.append(b"x" * (32 << 20))
    time.sleep(0.1)
"""
"""Slowly enough for Ray, which looks four times a second whether 95 % are used."""


@pytest.fixture
def long(tiny: dict[str, Any]) -> dict[str, Any]:
    """A job that trains for a minute or two and saves every hundred steps."""
    spec = copy.deepcopy({**tiny, **LONG})
    spec["training"]["maxSteps"] = STEPS
    return spec


def test_a_job_whose_worker_pod_is_deleted_goes_on_from_its_checkpoint(
    team: World, long: dict[str, Any], submit: Submit
) -> None:
    """KubeRay replaces the pod, and the driver begins a new group of workers in the same Ray: no attempt is lost.

    With seconds of grace: in half a minute a fast machine makes all the steps that are left.
    """
    job = submit("deleted", long)
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    before = {pod["metadata"]["name"] for pod in team.pods(job, "worker")}
    team.kubectl("delete", "pod", min(before), "--grace-period=3", "--wait=false")
    team.wait(job, lambda: {pod["metadata"]["name"] for pod in team.pods(job, "worker")} - before, "another pod")
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed all the same", seconds=600)
    status = team.status(job)
    assert status["progress"]["step"] == STEPS
    assert len(status["attempts"]) == 1
    assert status["restarts"] == 0
    assert team.trainings(job) == 2
    assert team.steps_made(job) == list(range(1, STEPS + 1))


def test_a_job_whose_trainer_is_killed_goes_on_from_its_checkpoint(
    team: World, long: dict[str, Any], submit: Submit
) -> None:
    """As by the kernel: SIGKILL to one process in one pod, without a word to anybody."""
    job = submit("killed", long)
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    pod = min(pod["metadata"]["name"] for pod in team.pods(job, "worker"))
    killed = team.kubectl("exec", pod, "--container=ray", "--", "python3.11", "-c", KILL_TRAINER)
    assert int(killed) > 0
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed all the same", seconds=600)
    assert len(team.status(job)["attempts"]) == 1
    assert team.trainings(job) == 2
    assert team.steps_made(job) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("taking", "killers"), [(AT_ONCE, "(the kernel|Ray)"), (BY_AND_BY, "Ray")], ids=["at once", "by and by"]
)
def test_a_job_whose_trainer_runs_out_of_memory_goes_on_with_smaller_micro_batches(
    team: World, long: dict[str, Any], submit: Submit, taking: str, killers: str
) -> None:
    """One process in the pod is killed and the pod lives on, so that Kubernetes tells nothing of it."""
    long["training"]["microBatchSize"] = 2
    job = submit("too-large", long)
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    seen = team.saved(job)
    pod = min(pod["metadata"]["name"] for pod in team.pods(job, "worker"))
    team.kubectl("exec", pod, "--container=ray", "--", "python3.11", "-c", taking)
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed all the same", seconds=600)
    first, second = team.status(job)["attempts"]
    assert first["outcome"] == "OutOfMemory"
    assert re.search(f"killed by {killers} for want of memory", first["message"])
    assert "spec.cluster.workers.memory" in first["message"]
    assert second["resumedFromStep"] >= seen
    assert team.steps_made(job)[-1] - second["resumedFromStep"] < MOST_LOST
    assert team.status(job)["resolved"]["microBatchSize"] == 1
    assert team.status(job)["progress"]["step"] == STEPS


def test_a_job_whose_head_is_deleted_goes_on_in_another_attempt(
    team: World, long: dict[str, Any], submit: Submit
) -> None:
    job = submit("headless", long)
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    seen = team.saved(job)
    (head,) = team.pods(job, "head")
    team.kubectl("delete", "pod", head["metadata"]["name"], "--grace-period=0", "--force")
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed all the same", seconds=600)
    first, second = team.status(job)["attempts"]
    assert first["outcome"] in ("NodeLost", "Preempted")
    assert second["resumedFromStep"] >= seen
    assert team.steps_made(job)[-1] - second["resumedFromStep"] < MOST_LOST
    assert team.status(job)["progress"]["step"] == STEPS


def test_a_job_does_not_notice_that_the_operators_leader_dies(
    team: World, long: dict[str, Any], submit: Submit, product: Cluster
) -> None:
    job = submit("leaderless", long)
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    before = leader(product)
    product.kubectl("--namespace", NAMESPACE, "delete", "pod", before, "--grace-period=0", "--force")
    team.wait(job, lambda: leader(product) not in ("", before), "the other replica to lead")
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
    assert len(team.status(job)["attempts"]) == 1
    assert team.steps_made(job) == list(range(1, STEPS + 1))


def test_a_drained_node_waits_for_a_job_and_one_that_is_emptied_all_the_same_takes_its_worker_along(
    team: World, long: dict[str, Any], submit: Submit, product: Cluster
) -> None:
    """A drain asks the job's disruption budget; without it, pods have the notice that is in their grace period."""
    long["training"]["maxSteps"] = DRAINED_STEPS
    job = submit("drained", long)
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    (worker,) = [pod for pod in team.pods(job, "worker") if pod["spec"]["nodeName"] == NODES[1].name]
    drain = ("drain", NODES[1].name, "--ignore-daemonsets", "--delete-emptydir-data", f"--pod-selector={JOB}={job}")
    try:
        asked = product.kubectl.run(*drain, "--timeout=15s")
        assert asked.returncode != 0
        assert "disruption budget" in asked.stderr
        assert team.trainings(job) == 1
        product.kubectl(*drain, "--disable-eviction", "--timeout=120s")
    finally:
        product.kubectl("uncordon", NODES[1].name)
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed all the same", seconds=600)
    assert worker["metadata"]["name"] not in {pod["metadata"]["name"] for pod in team.pods(job, "worker")}
    assert len(team.status(job)["attempts"]) == 1
    assert team.trainings(job) == 2
    assert team.steps_made(job) == list(range(1, DRAINED_STEPS + 1))


def leader(cluster: Cluster) -> str:
    """The pod that holds the lease."""
    lease = json.loads(cluster.kubectl("--namespace", NAMESPACE, "get", "lease", "finetune-operator", "--output=json"))
    return str(lease["spec"].get("holderIdentity") or "").partition("_")[0]


def test_a_job_that_loses_a_node_goes_on_with_what_is_left_until_it_is_back(
    team: World, long: dict[str, Any], submit: Submit
) -> None:
    """There is no room for the lost worker anywhere else. One attempt, smaller and larger again."""
    workers = {"replicas": 2, "minReplicas": 1, "resizeAfterSeconds": 10}
    training = {**long["training"], "maxSteps": 100_000}
    job = submit("lost", {**long, "cluster": {"workers": workers}, "training": training})
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    seen, lost = team.saved(job), NODES[1]
    assert any(pod["spec"]["nodeName"] == lost.name for pod in team.pods(job, "worker"))
    assert team.world_size(job) == 2
    team.cluster.lose(lost)
    try:
        team.wait(job, lambda: team.world_size(job) == 1, "training with one worker", seconds=600)
        team.wait(job, lambda: team.saved(job) >= seen + 3 * EVERY, "checkpoints of it", seconds=600)
        assert {pod["spec"].get("nodeName") for pod in team.pods(job, "worker") if is_running(pod)} == {"node-1"}
    finally:
        team.cluster.restore(lost)
    team.wait(
        job, lambda: team.world_size(job) == 2 and len(team.resumptions(job)) > 1, "both to train again", seconds=600
    )
    assert len(team.status(job)["attempts"]) == 1
    (made, after_loss), *_, (grown_at, with_both) = team.resumptions(job)
    assert after_loss >= seen
    assert made - after_loss < MOST_LOST
    assert with_both >= grown_at > after_loss


def is_running(pod: dict[str, Any]) -> bool:
    return pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
