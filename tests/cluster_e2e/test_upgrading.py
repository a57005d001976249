"""The release is upgraded, taken away and installed again, on a real cluster, and leaves what it promises to leave."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.nodes.cluster import Cluster
from tests.cluster.processes import wait_until
from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import CHART, NAMESPACE, World

pytestmark = pytest.mark.cluster

SELECTOR = "--selector=app.kubernetes.io/component=operator"


def operators(cluster: Cluster) -> list[dict[str, Any]]:
    listed = cluster.kubectl("get", "pods", "--namespace", NAMESPACE, SELECTOR, "--output=json")
    pods: list[dict[str, Any]] = json.loads(listed)["items"]
    return pods


def runtime(cluster: Cluster) -> str:
    """Which object the release's runtime is."""
    return cluster.kubectl("get", "finetuneruntime", "default", "--output=jsonpath={.metadata.uid}")


def test_an_upgrade_replaces_the_operators_pods_one_by_one_and_leaves_the_runtime(product: Cluster) -> None:
    named = runtime(product)
    before = {pod["metadata"]["name"] for pod in operators(product)}
    where = ("--namespace", NAMESPACE, "--reuse-values", "--set", "logLevel=debug")
    product.helm("upgrade", "finetune-operator", CHART, *where, "--wait", "--timeout", "110s")
    status = ("rollout", "status", "deployment/finetune-operator", "--timeout=110s")
    product.kubectl("--namespace", NAMESPACE, *status)
    wait_until(lambda: not before & {pod["metadata"]["name"] for pod in operators(product)}, "the old pods to go")
    assert len(operators(product)) == 2
    assert runtime(product) == named


def test_jobs_outlive_the_release_and_are_looked_after_by_the_next_one(
    team: World, tiny: dict[str, Any], submit: Submit, product: Cluster
) -> None:
    job = submit("outlives", {**tiny, "suspend": True})
    team.wait(job, lambda: team.phase(job) == "Suspended", "the job to be suspended", seconds=60)
    named = runtime(product)
    values = product.helm("get", "values", "finetune-operator", "--namespace", NAMESPACE, "--output", "yaml")
    product.helm("uninstall", "finetune-operator", "--namespace", NAMESPACE, "--wait", "--timeout", "110s")
    try:
        wait_until(lambda: not operators(product), "the operator to be gone")
        assert team.phase(job) == "Suspended"
        assert runtime(product) == named
    finally:
        where = ("--namespace", NAMESPACE, "--values", "-", "--wait", "--timeout", "110s")
        product.helm("install", "finetune-operator", CHART, *where, stdin=values)
    team.kubectl("patch", "finetunejob", job, "--type=merge", "--patch", '{"spec": {"suspend": false}}')
    team.wait(job, lambda: team.phase(job) != "Suspended", "the new operator to take it up", seconds=60)
