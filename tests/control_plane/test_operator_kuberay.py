"""The operator and the real KubeRay together: pods are pretended, everything between a job and them is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.client import Client
from tests.cluster.kuberay import KubeRay
from tests.cluster.pods import Kwok
from tests.cluster.server import Server
from tests.control_plane.operators import Jobs, Operator, operator

pytestmark = pytest.mark.control_plane

GPUS = {"cluster.workers": {"replicas": 2, "gpus": 1}, "failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}}


@pytest.fixture
def jobs(api: Client, namespace: str) -> Jobs:
    return Jobs(api, namespace)


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
    jobs.submit("tiny", GPUS)
    running.wait(lambda: roles(jobs) == ["head", "worker", "worker"], "the pods")
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-1"), "the entrypoint to run")
    jobs.report("tiny", 1, step=1)
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    assert jobs.condition("tiny", "ClusterReady")[0] == "True"
    jobs.report("tiny", 1, step=100)
    kuberay.ray.end(jobs.namespace, "tiny-1")
    running.wait(jobs.is_at("tiny", "Succeeded"), "the job to succeed")
    running.wait(lambda: roles(jobs) == [], "the pods to be given back")


def test_a_failed_cluster_is_replaced_by_another(jobs: Jobs, running: Operator, kuberay: KubeRay, nodes: Kwok) -> None:
    jobs.submit("tiny", GPUS)
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-1"), "the entrypoint to run")
    kuberay.ray.end(
        jobs.namespace, "tiny-1", "FAILED", "Job entrypoint command failed with exit code 6, last available logs: none"
    )
    running.wait(jobs.has("tiny-2"), "the second attempt")
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-2"), "its entrypoint to run")
    assert jobs.attempts("tiny") == [(1, "StorageError"), (2, None)]


def test_a_suspended_job_holds_no_pods_and_a_deleted_one_leaves_none(
    jobs: Jobs, running: Operator, kuberay: KubeRay, nodes: Kwok
) -> None:
    jobs.submit("tiny", GPUS)
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-1"), "the entrypoint to run")
    jobs.change("tiny", {"spec": {"suspend": True}})
    running.wait(jobs.is_at("tiny", "Suspended"), "the job to be suspended")
    running.wait(lambda: roles(jobs) == [], "the pods to be given back")
    jobs.change("tiny", {"spec": {"suspend": False}})
    running.wait(lambda: kuberay.ray.running(jobs.namespace, "tiny-2"), "the next attempt to run")
    jobs.delete("tiny")
    running.wait(lambda: roles(jobs) == [] and jobs.children() == [], "everything to be gone")
