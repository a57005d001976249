"""A platform team installs the product with three lines of values on a real cluster."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.images import OPERATOR
from tests.cluster.nodes.cluster import Cluster
from tests.cluster_e2e.world import NAMESPACE

pytestmark = pytest.mark.cluster


def found(cluster: Cluster, *arguments: str) -> Any:
    return json.loads(cluster.kubectl("get", *arguments, "--output=json"))


def test_both_replicas_of_the_operator_are_ready_on_different_nodes(product: Cluster) -> None:
    pods = found(product, "pods", "--namespace", NAMESPACE, "--selector=app.kubernetes.io/component=operator")["items"]
    running = [pod for pod in pods if pod["status"]["phase"] == "Running"]
    assert len(running) == 2
    assert {pod["spec"]["nodeName"] for pod in running} == {"node-1", "node-2"}
    for pod in running:
        (container,) = pod["status"]["containerStatuses"]
        assert container["ready"]
        assert container["restartCount"] == 0
        assert container["image"] == OPERATOR


def test_one_replica_leads(product: Cluster) -> None:
    lease = found(product, "lease", "finetune-operator", "--namespace", NAMESPACE)
    names = [pod["metadata"]["name"] for pod in found(product, "pods", "--namespace", NAMESPACE)["items"]]
    assert any(name in lease["spec"]["holderIdentity"] for name in names)


def test_our_kinds_are_served_with_a_runtime_that_jobs_can_name(product: Cluster) -> None:
    runtime = found(product, "finetuneruntime", "default")
    assert runtime["spec"]["storage"] == "pvc://shared/runs"
    assert "runtimeRef" in product.kubectl("explain", "finetunejob.spec")


def test_kuberay_runs_as_a_pod(product: Cluster) -> None:
    deployment = found(product, "deployment", "kuberay-operator", "--namespace", "ray-system")
    assert deployment["status"]["availableReplicas"] == 1


def test_helms_own_test_of_the_release_passes(product: Cluster) -> None:
    assert "Succeeded" in product.helm("test", "finetune-operator", "--namespace", NAMESPACE)


def test_the_operator_may_not_read_secrets_or_change_what_is_not_its_own(product: Cluster) -> None:
    account = f"--as=system:serviceaccount:{NAMESPACE}:finetune-operator"
    refused = ("get secrets", "list secrets", "create pods", "delete pods", "update finetunejobs", "delete namespaces")
    for asked in refused:
        done = product.kubectl.run("auth", "can-i", *asked.split(), account, "--all-namespaces")
        assert done.stdout.strip() == "no", asked
