"""What is built for a job is what a real API server takes, what its rights are, and what keeps its pods alive.

The objects are the golden ones of tests/operator/resources, made for one namespace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from finetune_operator import names
from finetune_operator.kinds import (
    CONFIG_MAP,
    NETWORK_POLICY,
    POD,
    POD_DISRUPTION_BUDGET,
    RAY_JOB,
    ROLE,
    ROLE_BINDING,
    SERVICE_ACCOUNT,
    Kind,
)
from tests.cluster.client import ApiError, Client
from tests.cluster.controllers import kube_controller_manager
from tests.cluster.processes import wait_until
from tests.cluster.server import Server
from tests.control_plane.conftest import ROOT, Built

pytestmark = pytest.mark.control_plane

GOLDEN = sorted((ROOT / "tests" / "operator" / "resources" / "golden").glob("*.yaml"))
KINDS = {
    kind.name: kind
    for kind in (CONFIG_MAP, NETWORK_POLICY, POD_DISRUPTION_BUDGET, RAY_JOB, ROLE, ROLE_BINDING, SERVICE_ACCOUNT)
}
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
STRICT = "fieldValidation=Strict"
REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"


def documents(file: Any) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(file.read_text(encoding="utf-8"))


def golden(name: str, kind: Kind, namespace: str) -> dict[str, Any]:
    """The golden object of a kind, for this namespace and without its owner, which is not there."""
    [found] = [one for one in documents(next(file for file in GOLDEN if file.stem == name)) if one["kind"] == kind.name]
    return placed(found, namespace)


def placed(document: dict[str, Any], namespace: str) -> dict[str, Any]:
    placed = copy.deepcopy(document)
    placed["metadata"] |= {"namespace": namespace}
    del placed["metadata"]["ownerReferences"]
    for subject in placed.get("subjects", ()):
        subject["namespace"] = namespace
    return placed


def templates(ray_job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


def missing(asked: Any, stored: Any, path: str = "") -> Iterator[str]:
    """Where `stored` lacks something that was asked for."""
    if isinstance(asked, dict) and isinstance(stored, dict):
        for key, value in asked.items():
            yield from missing(value, stored.get(key), f"{path}.{key}")
    elif isinstance(asked, list) and isinstance(stored, list) and len(asked) == len(stored):
        for number, (value, kept) in enumerate(zip(asked, stored, strict=True)):
            yield from missing(value, kept, f"{path}[{number}]")
    elif asked != stored:
        yield f"{path}: {asked!r} became {stored!r}"


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_every_object_is_taken_whole(file: Any, api: Client, namespace: str) -> None:
    for document in documents(file):
        kind = KINDS[document["kind"]]
        asked = placed(document, namespace)
        stored = api.create(f"{kind.path(namespace)}?dryRun=All&{STRICT}", asked)
        assert list(missing(asked, stored)) == []


@pytest.mark.parametrize(
    "file", [file for file in GOLDEN if file.stem.startswith("rayjob")], ids=lambda file: file.stem
)
def test_the_pods_are_allowed_in_a_restricted_namespace_and_are_guaranteed(
    file: Any, api: Client, namespace: str
) -> None:
    api.merge(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": RESTRICTED}})
    [document] = documents(file)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": f"{owner(document)}-trainer"}}
    api.create(SERVICE_ACCOUNT.path(namespace), account)
    for number, template in enumerate(templates(document)):
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"]["name"] = f"pod-{number}"
        stored = api.create(f"{POD.path(namespace)}?dryRun=All&{STRICT}", pod)
        assert stored["status"]["qosClass"] == "Guaranteed"
        sources = {
            source
            for volume in stored["spec"]["volumes"]
            for source in volume.get("projected", {}).get("sources", [{}])[0]
        }
        assert sources == {"serviceAccountToken"}, "the token that we mount, and no other one"


def owner(document: dict[str, Any]) -> str:
    name = names.job_of(document["metadata"]["labels"])
    assert name is not None
    return name


def test_the_trainers_may_touch_their_own_progress_and_nothing_else(api: Client, namespace: str) -> None:
    for kind in (SERVICE_ACCOUNT, ROLE, ROLE_BINDING):
        api.create(kind.path(namespace), golden("around-a-job", kind, namespace))

    def may(verb: str, resource: str, name: str, where: str = namespace) -> bool:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": f"system:serviceaccount:{namespace}:example-trainer",
                "resourceAttributes": {"verb": verb, "resource": resource, "name": name, "namespace": where},
            },
        }
        allowed: bool = api.create(REVIEWS, review)["status"]["allowed"]
        return allowed

    wait_until(lambda: may("patch", "configmaps", "example-progress"), "the role to be known")
    assert may("get", "configmaps", "example-progress")
    for verb, resource, name in (
        ("delete", "configmaps", "example-progress"),
        ("update", "configmaps", "example-progress"),
        ("list", "configmaps", ""),
        ("patch", "configmaps", "other-progress"),
        ("get", "configmaps", "example-runtime"),
        ("get", "secrets", "example-progress"),
        ("get", "pods", "example-progress"),
    ):
        assert not may(verb, resource, name), (verb, resource, name)
    assert not may("patch", "configmaps", "example-progress", "default")


def evict(api: Client, namespace: str, name: str) -> None:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
    api.create(f"{POD.path(namespace, name)}/eviction", body)


def test_a_ready_pod_is_not_evicted_and_one_that_is_not_ready_is(
    api: Client, server: Server, built: Built, namespace: str
) -> None:
    budget = POD_DISRUPTION_BUDGET.path(namespace, "example")
    api.create(POD_DISRUPTION_BUDGET.path(namespace), golden("around-a-job", POD_DISRUPTION_BUDGET, namespace))
    for name, ready in (("ready", "True"), ("broken", "False")):
        labels = names.pod_labels("example", 1, names.WORKER)
        spec = {
            "containers": [{"name": "ray", "image": "x"}],
            "nodeName": "nowhere",
            "terminationGracePeriodSeconds": 0,
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
        api.create(POD.path(namespace), pod)
        condition = {"type": "Ready", "status": ready}
        status = {"phase": "Running", "conditions": [condition], "startTime": "2026-01-01T12:00:00Z"}
        api.merge(f"{POD.path(namespace, name)}/status", {"status": status})

    def worked_out() -> bool:
        status = api.get(budget).get("status", {})
        return (status.get("expectedPods"), status.get("currentHealthy")) == (2, 1)

    with kube_controller_manager(built("kube-controller-manager"), server, ("disruption-controller",)) as controller:
        wait_until(worked_out, "the budget to be worked out", controller)
        [condition] = api.get(budget)["status"]["conditions"]
        assert condition["reason"] == "InsufficientPods"  # and not SyncFailed
        with pytest.raises(ApiError) as refused:
            evict(api, namespace, "ready")
        assert refused.value.code == 429
        evict(api, namespace, "broken")
