"""What keeps an attempt from starting is told within a minute, and the operator looks again by itself to tell it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import names
from finetune_operator.states import project_pod, read_pod, read_ray_job
from finetune_operator.times import written
from finetune_operator.views import project_ray_job
from tests.operator.decide_factories import Cluster

PENDING = {"type": "PodReadyToStartContainers", "status": "False"}
SECRET = {"name": "added-0", "secret": {"secretName": "hub-token", "defaultMode": 420}}
CONFIG = {"name": "added-1", "configMap": {"name": "proxies"}}
CLAIM = {"name": "claim-0", "persistentVolumeClaim": {"claimName": "runs"}}


def starting(in_cluster: bool = False) -> Cluster:
    """A job whose RayJob was made just now."""
    cluster = Cluster({"runtimeRef.name": "pool"} if in_cluster else None)
    if in_cluster:
        cluster.one_machine = False
        cluster.use_runtime({"storage": "pvc://runs/all"})
    cluster.settle()
    return cluster


def waits(reason: str, message: str = "", name: str = "ray") -> dict[str, Any]:
    return {"name": name, "state": {"waiting": {"reason": reason, "message": message}}}


def mounting(cluster: Cluster, *volumes: Any, reason: str = "ContainerCreating", **status: Any) -> Cluster:
    """The kubelet has just taken a pod that mounts these volumes."""
    told = {
        "phase": "Pending",
        "startTime": written(cluster.now),
        "conditions": [PENDING],
        "containerStatuses": [waits(reason)],
    }
    cluster.pod("example-1-head", told | status, names.HEAD)
    plan = {"name": "plan", "configMap": {"name": "example-1-plan"}}
    cluster.pods[-1]["spec"]["volumes"] = [plan, {"name": "scratch", "emptyDir": {}}, *volumes]
    return cluster


def test_a_pod_that_waits_for_its_volumes_is_told_of_with_what_it_mounts_after_half_a_minute() -> None:
    cluster = mounting(starting(), SECRET, CONFIG, CLAIM)
    assert cluster.settle().requeue_after == 30
    assert cluster.holds("ClusterReady") == ("False", "Starting")
    cluster.wait(30).settle()
    assert cluster.holds("ClusterReady") == ("False", "VolumesNotMounted")
    mounts = "It mounts Secret hub-token, ConfigMap proxies, PersistentVolumeClaim runs; `kubectl describe pod example-"
    assert mounts in cluster.says("ClusterReady")
    said = cluster.says("ClusterReady")
    cluster.wait(300).settle()
    assert cluster.says("ClusterReady") == said


def test_a_pod_whose_first_container_waits_for_volumes_is_told_of_too() -> None:
    cluster = mounting(starting(), SECRET, reason="PodInitializing")
    cluster.pods[-1]["status"]["initContainerStatuses"] = [waits("PodInitializing", name="wait")]
    cluster.wait(30).settle()
    assert cluster.holds("ClusterReady") == ("False", "VolumesNotMounted")


@pytest.mark.parametrize(
    "status",
    [
        pytest.param({"conditions": [PENDING | {"status": "True"}]}, id="its image is being pulled"),
        pytest.param(
            {"initContainerStatuses": [{"name": "wait", "state": {"running": {}}}]}, id="its first container runs"
        ),
        pytest.param({"containerStatuses": []}, id="no kubelet has looked at it"),
        pytest.param({"startTime": "soon"}, id="nobody knows since when"),
    ],
)
def test_a_pod_that_gets_on_is_no_obstacle(status: dict[str, Any]) -> None:
    cluster = mounting(starting(), SECRET, **status).wait(600)
    cluster.settle()
    assert cluster.holds("ClusterReady") == ("False", "Starting")


def test_what_the_volumes_were_is_in_the_reason_for_which_the_attempt_ended() -> None:
    cluster = mounting(starting(), SECRET).wait(3600)
    cluster.settle()
    assert cluster.attempt["outcome"] == "StartTimeout"
    assert "Secret hub-token" in cluster.attempt["message"]


def test_pods_that_kuberay_cannot_create_are_told_in_the_servers_words() -> None:
    cluster = starting(in_cluster=True)
    said = 'pods "example-1-x-head" is forbidden: exceeded quota: gpus'
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateHeadPod", "message": said}
    fine = {"type": "HeadPodReady", "status": "False"}
    status = {"conditions": [fine, failure], "head": {"podIP": "1.2.3.4"}}
    cluster.kuberay(jobDeploymentStatus="Initializing", rayClusterStatus=status).settle()
    assert cluster.holds("ClusterReady") == ("False", "PodsNotCreated")
    assert cluster.says("ClusterReady") == f"KubeRay cannot create the pods of RayJob example-1: {said}"
    kept = project_ray_job(cluster.ray_job())
    assert kept["status"]["rayClusterStatus"] == {"conditions": [failure]}
    assert read_ray_job(kept) == read_ray_job(cluster.ray_job())
    cluster.kuberay(rayClusterStatus={"conditions": [failure | {"status": "False"}]}).settle()
    assert cluster.holds("ClusterReady") == ("False", "Starting")


def test_a_ray_job_that_nobody_answers_is_told_of_after_half_a_minute() -> None:
    cluster = starting(in_cluster=True)
    assert cluster.decide().requeue_after == 30
    cluster.wait(30).settle()
    assert cluster.holds("ClusterReady") == ("False", "KubeRaySilent")
    assert "kubectl get deployments -A -l app.kubernetes.io/component=kuberay-operator" in cluster.says("ClusterReady")
    cluster.kuberay(jobDeploymentStatus="Initializing").settle()
    assert cluster.holds("ClusterReady") == ("False", "Starting")


def test_nothing_is_expected_of_kuberay_on_one_machine() -> None:
    cluster = starting().wait(60)
    cluster.settle()
    assert cluster.holds("ClusterReady") == ("False", "Starting")


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"containerStatuses": [waits("ImagePullBackOff", "no such image")]}, "ImagePullBackOff"),
        ({"containerStatuses": [waits("a word that is none")]}, "PodsWaiting"),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]}, "Unschedulable"),
    ],
)
def test_the_reason_is_kubernetes_own_word_where_it_has_one(status: dict[str, Any], reason: str) -> None:
    cluster = starting().pod("example-1-head", {"phase": "Pending"} | status)
    cluster.settle()
    assert cluster.holds("ClusterReady") == ("False", reason)


def test_a_projected_pod_reads_as_the_whole_one() -> None:
    cluster = mounting(starting(), SECRET, CONFIG, CLAIM)
    state = read_pod(project_pod(cluster.pods[-1]))
    assert state == read_pod(cluster.pods[-1])
    assert state.volumes == ("Secret hub-token", "ConfigMap proxies", "PersistentVolumeClaim runs")
