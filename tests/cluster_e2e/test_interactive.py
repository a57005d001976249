"""The sample of a Ray cluster that stays, applied with this cluster's names in it: jobs are handed to it from outside,
by its Jobs API and by Ray Client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import Phase
from finetune_client import Client
from finetune_client.errors import NotAllowed
from tests.cluster.processes import wait_until
from tests.cluster_e2e.conftest import ROOT
from tests.cluster_e2e.world import CLAIM, World
from tests.factories import job_document

pytestmark = pytest.mark.cluster

SAMPLE = ROOT / "manifests" / "samples" / "interactive" / "workbench.yaml"
NAME = "workbench"


@dataclass(frozen=True)
class Workbench:
    """Where its head is, and what it asks for."""

    address: str
    token: str


def fitted(document: dict[str, Any]) -> dict[str, Any]:
    """The sample with the claim and the sizes of this cluster."""
    spec = document["spec"]
    (group,) = spec["workerGroupSpecs"]
    group["rayStartParams"] = {"num-cpus": "1"}
    for pod in (spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        (container,) = pod["containers"]
        container["resources"] = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}}
        pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = CLAIM
        container["volumeMounts"][0]["mountPath"] = container["env"][0]["value"] = f"/mnt/pvc/{CLAIM}"
    return document


@pytest.fixture(scope="module")
def workbench(team: World) -> Iterator[Workbench]:
    team.apply(fitted(yaml.safe_load(SAMPLE.read_text(encoding="utf-8"))))
    try:
        wait_until(lambda: is_ready(team), "the Ray cluster to be ready")
        secret = json.loads(team.kubectl("get", "secret", NAME, "--output=json"))
        (head,) = [pod for pod in pods(team) if pod["metadata"]["labels"]["ray.io/node-type"] == "head"]
        yield Workbench(head["status"]["podIP"], base64.b64decode(secret["data"]["auth_token"]).decode())
    finally:
        team.kubectl("delete", "raycluster", NAME, "--wait=true", "--timeout=100s")
        wait_until(lambda: not pods(team), "its pods to be gone")


def pods(team: World) -> list[dict[str, Any]]:
    selector = f"--selector=ray.io/cluster={NAME}"
    items: list[dict[str, Any]] = json.loads(team.kubectl("get", "pods", selector, "--output=json"))["items"]
    return items


def is_ready(team: World) -> bool:
    status = json.loads(team.kubectl("get", "raycluster", NAME, "--output=json")).get("status", {})
    return bool(status.get("state") == "ready" and status.get("readyWorkerReplicas") == 1)


@pytest.fixture
def job(tiny: dict[str, Any]) -> dict[str, Any]:
    spec = {key: value for key, value in tiny.items() if key != "runtimeRef"}
    return job_document(name="tried") | {"spec": {**spec, "checkpoint": {"everySteps": 20}}}


def test_who_has_no_token_is_told_where_it_belongs(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with Client(ray=f"http://{workbench.address}:8265") as client, pytest.raises(NotAllowed, match="RAY_AUTH_TOKEN"):
        client.list()


@pytest.mark.parametrize("address", ["http://{}:8265", "ray://{}:10001"], ids=["Jobs API", "Ray Client"])
def test_a_job_is_submitted_left_found_again_and_ends_with_a_model_on_the_claim(
    team: World, workbench: Workbench, job: dict[str, Any], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", workbench.token)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    where = address.format(workbench.address)
    with Client(ray=where) as first:
        first.submit(job)
    with Client(ray=where) as client:
        found = client.job("tried")
        assert [status.phase for status in found.watch()][-1] is Phase.SUCCEEDED
        assert any("checkpoint of step 40" in line.text for line in found.logs())
        (artifact,) = found.artifacts()
        told = artifact.uri.removeprefix(f"file:///mnt/pvc/{CLAIM}/")
        assert (team.folder / Path(told) / "adapter_model.safetensors").stat().st_size > 0
        found.cancel()
        assert client.list() == []
