"""The sample of a Ray cluster that stays, applied with the names and sizes of the cluster of tests.cluster."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from tests.cluster.processes import wait_until
from tests.cluster_e2e.world import CLAIM, ROOT, World

__all__ = ["Workbench", "workbench_in"]

SAMPLE = ROOT / "manifests" / "samples" / "interactive" / "workbench.yaml"
NAME = "workbench"


@dataclass(frozen=True)
class Workbench:
    """Where its head is, and what it asks for."""

    address: str
    token: str


def _fitted(document: dict[str, Any]) -> dict[str, Any]:
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


@contextmanager
def workbench_in(team: World) -> Iterator[Workbench]:
    """The Ray cluster, ready, as long as the block."""
    team.apply(_fitted(yaml.safe_load(SAMPLE.read_text(encoding="utf-8"))))
    try:
        wait_until(lambda: _is_ready(team), "the Ray cluster to be ready")
        secret = json.loads(team.kubectl("get", "secret", NAME, "--output=json"))
        (head,) = [pod for pod in _pods(team) if pod["metadata"]["labels"]["ray.io/node-type"] == "head"]
        yield Workbench(head["status"]["podIP"], base64.b64decode(secret["data"]["auth_token"]).decode())
    finally:
        team.kubectl("delete", "raycluster", NAME, "--wait=true", "--timeout=100s")
        wait_until(lambda: not _pods(team), "its pods to be gone")


def _pods(team: World) -> list[dict[str, Any]]:
    selector = f"--selector=ray.io/cluster={NAME}"
    items: list[dict[str, Any]] = json.loads(team.kubectl("get", "pods", selector, "--output=json"))["items"]
    return items


def _is_ready(team: World) -> bool:
    status = json.loads(team.kubectl("get", "raycluster", NAME, "--output=json")).get("status", {})
    return bool(status.get("state") == "ready" and status.get("readyWorkerReplicas") == 1)
