"""The operator and the real KubeRay together: pods are pretended, everything between a job and them is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kuberay import KubeRay
from tests.cluster.pods import Kwok
from tests.cluster.processes import Started
from tests.cluster.server import Server
from tests.control_plane.operators import Jobs, Operator, operator

pytestmark = pytest.mark.control_plane

GPUS = {"cluster.workers": {"replicas": 2, "gpus": 1}, "failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}}


@pytest.fixture
def running(jobs: Jobs, server: Server, tmp_path: Path) -> Iterator[Operator]:
    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one:
        yield one


def roles(jobs: Jobs) -> list[str]:
    label = "labelSelector=finetune-operator.io%2Frole"
    pods = jobs.api.items(f"/api/v1/namespaces/{jobs.namespace}/pods?{label}")
    return sorted(pod["metadata"]["labels"]["finetune-operator.io/role"] for pod in pods)


def test_a_job_runs_on_a_ray_cluster_and_ends_well(
    jobs: Jobs, running: Operator, kuberay: KubeRay, nodes: Kwok
) -> None:
    jobs.submit("tiny", GPUS | jobs.with_storage())
    running.wait(lambda: roles(jobs) == ["head", "worker", "worker"], "the pods")
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-1"), "the entrypoint to run")
    jobs.report("tiny", 1, step=1)
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    # KubeRay says that it runs a moment after it has handed the entrypoint over.
    running.wait(
        lambda: jobs.condition("tiny", "ClusterReady")[0] == "True", "the job to say that its cluster is there"
    )
    jobs.report("tiny", 1, step=100)
    kuberay.ray.end(jobs.namespace, "tiny-1")
    running.wait(jobs.is_at("tiny", "Succeeded"), "the job to succeed")
    running.wait(lambda: roles(jobs) == [], "the pods to be given back")


def test_a_failed_cluster_is_replaced_by_another(jobs: Jobs, running: Operator, kuberay: KubeRay, nodes: Kwok) -> None:
    jobs.submit("tiny", GPUS | jobs.with_storage())
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-1"), "the entrypoint to run")
    kuberay.ray.end(
        jobs.namespace, "tiny-1", "FAILED", "Job entrypoint command failed with exit code 6, last available logs: none"
    )
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-2"), "the entrypoint of the second attempt to run")
    running.wait(lambda: jobs.attempts("tiny") == [(1, "StorageError"), (2, None)], "the status to tell of both")
    running.wait(jobs.has("tiny-2"), "the first RayJob to be gone")


def test_pods_that_the_namespace_forbids_are_told_of_until_it_allows_them(
    jobs: Jobs, running: Operator, kuberay: KubeRay, nodes: Kwok
) -> None:
    limits = f"/api/v1/namespaces/{jobs.namespace}/limitranges"
    small = {"type": "Container", "max": {"cpu": "1m"}}
    jobs.api.create(limits, {"metadata": {"name": "small"}, "spec": {"limits": [small]}})
    jobs.submit("tiny", GPUS | jobs.with_storage())
    refused = ("False", "PodsNotCreated")
    running.wait(lambda: jobs.condition("tiny", "ClusterReady") == refused, "the status to tell of it")
    [told] = [one["message"] for one in jobs.status("tiny")["conditions"] if one["type"] == "ClusterReady"]
    assert "maximum cpu usage per Container is 1m" in told
    jobs.api.delete(f"{limits}/small")
    running.wait(lambda: jobs.condition("tiny", "ClusterReady")[0] == "True", "the cluster to be there")


def test_a_suspended_job_holds_no_pods_and_a_deleted_one_leaves_none(
    jobs: Jobs, running: Operator, kuberay: KubeRay, nodes: Kwok
) -> None:
    jobs.submit("tiny", GPUS | jobs.with_storage())
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-1"), "the entrypoint to run")
    jobs.change("tiny", {"spec": {"suspend": True}})
    running.wait(jobs.is_at("tiny", "Suspended"), "the job to be suspended")
    running.wait(lambda: roles(jobs) == [], "the pods to be given back")
    jobs.change("tiny", {"spec": {"suspend": False}})
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-2"), "the next attempt to run")
    jobs.delete("tiny")
    running.wait(lambda: roles(jobs) == [] and jobs.children() == [], "everything to be gone")


QUEUES = "/apis/kueue.x-k8s.io/v1beta2"


def queue(jobs: Jobs, gpus: int) -> None:
    """A new LocalQueue "mine", with a quota of its own."""
    name, api = f"quota-{jobs.namespace}", jobs.api
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    flavor = {**version, "kind": "ResourceFlavor", "metadata": {"name": "any"}}
    api.apply(f"{QUEUES}/resourceflavors/any", flavor)
    quotas = {"cpu": "200", "memory": "2Ti", "nvidia.com/gpu": gpus}
    resources = [{"name": resource, "nominalQuota": quota} for resource, quota in quotas.items()]
    groups = [{"coveredResources": list(quotas), "flavors": [{"name": "any", "resources": resources}]}]
    spec = {"namespaceSelector": {}, "resourceGroups": groups}
    api.create(f"{QUEUES}/clusterqueues", {**version, "kind": "ClusterQueue", "metadata": {"name": name}, "spec": spec})
    local = {**version, "kind": "LocalQueue", "metadata": {"name": "mine"}, "spec": {"clusterQueue": name}}
    api.create(f"{QUEUES}/namespaces/{jobs.namespace}/localqueues", local)


def test_queued_jobs_run_in_turn_and_one_that_is_evicted_keeps_its_attempt(
    jobs: Jobs, running: Operator, kuberay: KubeRay, nodes: Kwok, kueue: Started
) -> None:
    queue(jobs, gpus=2)
    queued = GPUS | jobs.with_storage() | {"scheduling": {"queue": "mine"}}
    jobs.submit("first", queued)
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "first-1"), "the first to be admitted")
    jobs.report("first", 1, step=1)
    running.wait(jobs.is_at("first", "Running"), "the first to run")
    uid = jobs.ray_jobs()["first-1"]
    [workload] = jobs.api.items(f"{QUEUES}/namespaces/{jobs.namespace}/workloads")
    place = f"{QUEUES}/namespaces/{jobs.namespace}/workloads/{workload['metadata']['name']}"
    jobs.submit("second", queued)
    running.wait(jobs.is_at("second", "Queued"), "the second to wait in the queue")
    assert jobs.condition("second", "Admitted") == ("False", "Queued")
    jobs.api.merge(place, {"spec": {"active": False}})
    running.wait(jobs.is_at("first", "Queued"), "the first to be evicted")
    end_when_admitted(jobs, running, kuberay, "second")
    jobs.api.merge(place, {"spec": {"active": True}})
    end_when_admitted(jobs, running, kuberay, "first")
    assert jobs.ray_jobs()["first-1"] == uid


def end_when_admitted(jobs: Jobs, running: Operator, kuberay: KubeRay, name: str) -> None:
    """In its first attempt."""
    running.wait(lambda: kuberay.ray.running(jobs.namespace, f"{name}-1"), f"{name} to be admitted")
    jobs.report(name, 1, step=100)
    kuberay.ray.end(jobs.namespace, f"{name}-1")
    running.wait(jobs.is_at(name, "Succeeded"), f"{name} to succeed")
    assert jobs.attempts(name) == [(1, "Succeeded")]
