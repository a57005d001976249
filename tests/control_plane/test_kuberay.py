"""Real KubeRay acts on a RayJob here as it does in a cluster: what scenarios of our operator stand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.client import Client
from tests.cluster.kuberay import KubeRay
from tests.cluster.pods import Kwok, end_pod
from tests.cluster.processes import Started, wait_until

pytestmark = pytest.mark.control_plane

RAY = "/apis/ray.io/v1/namespaces"


def ray_job(name: str, **spec: Any) -> dict[str, Any]:
    """A head and one worker with a GPU; `spec` is added to the RayJob's."""
    cluster = {
        "rayVersion": "2.60.0",
        "headGroupSpec": {"rayStartParams": {}, "template": _template("head", cpu="1")},
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": 1,
                "minReplicas": 1,
                "maxReplicas": 1,
                "rayStartParams": {},
                "template": _template("worker", **{"nvidia.com/gpu": "1"}),
            }
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {"entrypoint": "true", "rayClusterSpec": cluster, "submissionMode": "HTTPMode"} | spec,
    }


def _template(name: str, **limits: str) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": name, "image": "ray", "resources": {"limits": limits}}]}}


def status(api: Client, namespace: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"{RAY}/{namespace}/rayjobs/{name}").get("status", {})
    return found


def is_at(api: Client, namespace: str, name: str, deployment: str) -> Callable[[], bool]:
    return lambda: status(api, namespace, name).get("jobDeploymentStatus") == deployment


def roles(api: Client, namespace: str) -> list[str]:
    pods = api.items(f"/api/v1/namespaces/{namespace}/pods?labelSelector=ray.io/node-type")
    return sorted(pod["metadata"]["labels"]["ray.io/node-type"] for pod in pods)


def test_a_ray_job_gets_a_cluster_and_pods(api: Client, namespace: str, kuberay: KubeRay) -> None:
    api.create(f"{RAY}/{namespace}/rayjobs", ray_job("first"))
    wait_until(lambda: roles(api, namespace) == ["head", "worker"], "both pods", kuberay.process)
    (cluster,) = api.items(f"{RAY}/{namespace}/rayclusters")
    assert cluster["metadata"]["ownerReferences"][0]["name"] == "first"
    assert status(api, namespace, "first")["rayClusterName"] == cluster["metadata"]["name"]


@pytest.mark.parametrize("mode", ["HTTPMode", "K8sJobMode"])
def test_a_ray_job_runs_until_it_is_ended(
    api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok, mode: str
) -> None:
    api.create(f"{RAY}/{namespace}/rayjobs", ray_job("whole", submissionMode=mode))
    wait_until(lambda: status(api, namespace, "whole").get("jobStatus") == "RUNNING", "the job to run", nodes.process)
    kuberay.ray.end(namespace, "whole")
    wait_until(is_at(api, namespace, "whole", "Complete"), "the job to be complete")
    assert status(api, namespace, "whole")["jobStatus"] == "SUCCEEDED"


def test_a_ray_job_that_fails_says_so_in_rays_words(api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok) -> None:
    api.create(f"{RAY}/{namespace}/rayjobs", ray_job("broken", backoffLimit=0))
    kuberay.ray.end(namespace, "broken", "FAILED", "Job entrypoint command failed with exit code 1.")
    wait_until(is_at(api, namespace, "broken", "Failed"), "the job to have failed")
    ended = status(api, namespace, "broken")
    assert (ended["jobStatus"], ended["reason"]) == ("FAILED", "AppFailed")
    assert ended["message"] == "Job entrypoint command failed with exit code 1."


def test_a_worker_that_ends_is_replaced(api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok) -> None:
    api.create(f"{RAY}/{namespace}/rayjobs", ray_job("mended"))
    wait_until(lambda: kuberay.ray.running(namespace, "mended"), "the job to run", nodes.process)
    path = f"/api/v1/namespaces/{namespace}/pods?labelSelector=ray.io/node-type%3Dworker"
    (worker,) = api.items(path)
    end_pod(api, namespace, worker["metadata"]["name"], exit_code=137, reason="OOMKilled")
    wait_until(lambda: {one["metadata"]["uid"] for one in api.items(path)} - {worker["metadata"]["uid"]}, "another")


def test_a_suspended_ray_job_has_no_pods(api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok) -> None:
    api.create(f"{RAY}/{namespace}/rayjobs", ray_job("paused", shutdownAfterJobFinishes=True))
    wait_until(lambda: kuberay.ray.running(namespace, "paused"), "the job to run", nodes.process)
    api.merge(f"{RAY}/{namespace}/rayjobs/paused", {"spec": {"suspend": True}})
    wait_until(is_at(api, namespace, "paused", "Suspended"), "the job to be suspended")
    wait_until(lambda: roles(api, namespace) == [], "its pods to be gone")


def test_a_deleted_ray_job_leaves_nothing(api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok) -> None:
    api.create(f"{RAY}/{namespace}/rayjobs", ray_job("gone"))
    wait_until(lambda: kuberay.ray.running(namespace, "gone"), "the job to run", nodes.process)
    api.delete(f"{RAY}/{namespace}/rayjobs/gone")
    wait_until(lambda: roles(api, namespace) == [], "its pods to be gone")
    assert api.items(f"{RAY}/{namespace}/rayclusters") == []


QUEUES = "/apis/kueue.x-k8s.io/v1beta2"


def queue(api: Client, namespace: str, gpus: int) -> str:
    """The name of a queue in the namespace, with a quota of its own."""
    flavor, name = {"name": "any"}, f"quota-{namespace}"
    api.apply(
        f"{QUEUES}/resourceflavors/any",
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": flavor},
    )
    resources = [{"name": "cpu", "nominalQuota": 100}, {"name": "nvidia.com/gpu", "nominalQuota": gpus}]
    groups = [{"coveredResources": [one["name"] for one in resources], "flavors": [flavor | {"resources": resources}]}]
    api.create(
        f"{QUEUES}/clusterqueues",
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "ClusterQueue",
            "metadata": {"name": name},
            "spec": {"namespaceSelector": {}, "resourceGroups": groups},
        },
    )
    api.create(
        f"{QUEUES}/namespaces/{namespace}/localqueues",
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "LocalQueue",
            "metadata": {"name": "mine"},
            "spec": {"clusterQueue": name},
        },
    )
    return "mine"


def test_kueue_holds_a_job_back_until_there_is_quota(
    api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok, kueue: Started
) -> None:
    label = {"kueue.x-k8s.io/queue-name": queue(api, namespace, gpus=1)}
    first, second = (ray_job(name, suspend=True, shutdownAfterJobFinishes=True) for name in ("first", "second"))
    for job in (first, second):
        job["metadata"]["labels"] = label
        api.create(f"{RAY}/{namespace}/rayjobs", job)
        wait_until(lambda: kuberay.ray.running(namespace, "first"), "the first job to run", kueue)
    wait_until(lambda: len(api.items(f"{QUEUES}/namespaces/{namespace}/workloads")) == 2, "both to be queued", kueue)
    assert api.get(f"{RAY}/{namespace}/rayjobs/second")["spec"]["suspend"]
    kuberay.ray.end(namespace, "first")
    wait_until(lambda: kuberay.ray.running(namespace, "second"), "the second job to run", kueue)


def test_kueue_evicts_a_job_when_its_quota_is_stopped_and_admits_it_again(
    api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok, kueue: Started
) -> None:
    document = ray_job("evicted", suspend=True, shutdownAfterJobFinishes=True)
    document["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": queue(api, namespace, gpus=1)}
    api.create(f"{RAY}/{namespace}/rayjobs", document)
    wait_until(lambda: kuberay.ray.running(namespace, "evicted"), "the job to run", kueue)
    quota = f"{QUEUES}/clusterqueues/quota-{namespace}"
    api.merge(quota, {"spec": {"stopPolicy": "HoldAndDrain"}})
    wait_until(is_at(api, namespace, "evicted", "Suspended"), "the job to be evicted", kueue)
    api.merge(quota, {"spec": {"stopPolicy": "None"}})
    wait_until(lambda: kuberay.ray.running(namespace, "evicted"), "the job to run again", kueue)


def test_without_a_queue_kueue_leaves_a_job_alone(
    api: Client, namespace: str, kuberay: KubeRay, nodes: Kwok, kueue: Started
) -> None:
    api.create(f"{RAY}/{namespace}/rayjobs", ray_job("free"))
    wait_until(lambda: kuberay.ray.running(namespace, "free"), "the job to run", kueue)
    assert api.items(f"{QUEUES}/namespaces/{namespace}/workloads") == []
