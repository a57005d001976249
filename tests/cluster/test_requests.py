"""Requests are told apart as rules and counts need them."""

from __future__ import annotations

import pytest

from tests.cluster.requests import Asked, asked_by

JOBS = "/apis/finetune-operator.io/v1alpha1"


@pytest.mark.parametrize(
    ("method", "target", "asked"),
    [
        ("GET", "/api/v1/pods?limit=500", Asked("list", "pods", path="/api/v1/pods")),
        ("GET", "/api/v1/pods?watch=1", Asked("watch", "pods", path="/api/v1/pods")),
        ("GET", "/api/v1/pods?watch=true&resourceVersion=7", Asked("watch", "pods", path="/api/v1/pods")),
        ("GET", "/api/v1/pods?watch=false", Asked("list", "pods", path="/api/v1/pods")),
        ("GET", "/api/v1/namespaces", Asked("list", "namespaces", path="/api/v1/namespaces")),
        ("GET", "/api/v1/namespaces/a", Asked("get", "namespaces", None, "a", "/api/v1/namespaces/a")),
        (
            "GET",
            f"{JOBS}/namespaces/a/finetunejobs/b",
            Asked("get", "finetunejobs", "a", "b", f"{JOBS}/namespaces/a/finetunejobs/b"),
        ),
        (
            "PUT",
            f"{JOBS}/namespaces/a/finetunejobs/b/status",
            Asked("update", "finetunejobs/status", "a", "b", f"{JOBS}/namespaces/a/finetunejobs/b/status"),
        ),
        (
            "POST",
            f"{JOBS}/namespaces/a/finetunejobs?dryRun=All",
            Asked("create", "finetunejobs", "a", path=f"{JOBS}/namespaces/a/finetunejobs"),
        ),
        (
            "PATCH",
            f"{JOBS}/finetuneruntimes/b",
            Asked("patch", "finetuneruntimes", None, "b", f"{JOBS}/finetuneruntimes/b"),
        ),
        ("DELETE", "/api/v1/pods", Asked("deletecollection", "pods", path="/api/v1/pods")),
        ("DELETE", "/api/v1/namespaces/a/pods/b", Asked("delete", "pods", "a", "b", "/api/v1/namespaces/a/pods/b")),
        ("GET", "/readyz", Asked("get", path="/readyz")),
        ("GET", "/apis", Asked("get", path="/apis")),
        ("GET", JOBS, Asked("get", path=JOBS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_is_named_as_the_server_would(method: str, target: str, asked: Asked) -> None:
    assert asked_by(method, target) == asked


@pytest.mark.parametrize(
    ("method", "target", "writes"),
    [
        ("GET", "/api/v1/pods", False),
        ("POST", "/api/v1/namespaces/a/pods", True),
        ("PATCH", "/api/v1/namespaces/a/pods/b", True),
        ("DELETE", "/api/v1/namespaces/a/pods/b", True),
        ("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", False),
        ("POST", "/api/v1/namespaces/a/serviceaccounts/b/token", False),
    ],
)
def test_a_write_is_what_changes_an_object(method: str, target: str, writes: bool) -> None:
    assert asked_by(method, target).writes is writes
