"""A platform team installs the product with three lines of values on a real cluster."""

from __future__ import annotations

import json
import ssl
from dataclasses import replace
from typing import Any

import pytest

from tests.cluster.client import ApiError, Client
from tests.cluster.images import OPERATOR
from tests.cluster.nodes.cluster import Cluster
from tests.cluster_e2e.world import NAMESPACE

pytestmark = pytest.mark.cluster

REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


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


def test_the_operators_image_is_slim(cluster: Cluster) -> None:
    assert cluster.images.compressed_size(OPERATOR) < 150_000_000


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


@pytest.fixture(scope="module")
def as_operator(product: Cluster) -> Client:
    """Who has a token of the account that the operator's pods run as."""
    deployment = found(product, "deployment", "finetune-operator", "--namespace", NAMESPACE)
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    token = product.kubectl("create", "token", account, "--namespace", NAMESPACE).strip()
    tls = ssl.create_default_context(cafile=str(product.layout.pki / "ca.crt"))
    return replace(product.client, token=token, tls=tls)


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ("list finetune-operator.io finetunejobs", True),
        ("update finetune-operator.io finetunejobs status", True),
        ("create ray.io rayjobs", True),
        ("create core configmaps", True),
        ("list core pods", True),
        ("get core secrets", False),
        ("list core secrets", False),
        ("create core pods", False),
        ("delete core pods", False),
        ("update finetune-operator.io finetunejobs", False),
        ("delete core namespaces", False),
    ],
)
def test_the_operator_may_do_its_work_and_neither_read_secrets_nor_change_what_is_not_its_own(
    as_operator: Client, asked: str, allowed: bool
) -> None:
    """In every namespace, as the API server says to the operator itself."""
    verb, group, *resource = asked.split()
    attributes = dict(zip(("resource", "subresource"), resource, strict=False))
    attributes |= {"verb": verb, "group": group.replace("core", "")}
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    answer = as_operator.create(REVIEWS, {**review, "spec": {"resourceAttributes": attributes}})
    assert answer["status"]["allowed"] is allowed


def test_the_operators_token_lists_jobs_and_no_secrets(as_operator: Client) -> None:
    assert as_operator.get("/apis/finetune-operator.io/v1alpha1/finetunejobs")["kind"] == "FineTuneJobList"
    with pytest.raises(ApiError, match='secrets is forbidden: User "system:serviceaccount:finetune-system:'):
        as_operator.get("/api/v1/secrets")
