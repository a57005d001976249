"""Fake nodes whose pods run as soon as they are scheduled (kwok), and pods that end as a test wants.

A pod of such a node becomes Running and Ready at once and stays so until somebody ends it here or deletes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.client import Client
from tests.cluster.processes import Started, started, wait_until
from tests.cluster.server import Server

__all__ = ["Kwok", "end_pod", "kwok"]

_STAGES = ("node/fast/node-initialize.yaml", "pod/fast/pod-ready.yaml", "pod/fast/pod-delete.yaml")
"""Left out is the one that completes a Job's pods at once: KubeRay's submitter lasts as long as the Ray job."""


@dataclass(frozen=True)
class Kwok:
    """The kubelet of every fake node."""

    process: Started
    client: Client

    def add_node(
        self, name: str, *, gpus: int = 8, cpu: str = "64", memory: str = "1Ti", labels: dict[str, str] | None = None
    ) -> None:
        """A node that is ready and may be scheduled on."""
        room = {"cpu": cpu, "memory": memory, "pods": "500", "nvidia.com/gpu": str(gpus)}
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
            "status": {"capacity": room, "allocatable": room},
        }
        path = f"/api/v1/nodes/{name}"
        self.client.create("/api/v1/nodes", node)
        wait_until(lambda: _is_ready(self.client.get(path)), f"node {name} to be ready", self.process)
        # New nodes are tainted as not ready, which a controller takes back that does not run here.
        self.client.merge(path, {"spec": {"taints": None}})

    def remove_node(self, name: str) -> None:
        """The node is gone; its pods stay in the API as they are."""
        self.client.delete(f"/api/v1/nodes/{name}")


@contextmanager
def kwok(program: Path, stages: Path, server: Server) -> Iterator[Kwok]:
    """`stages` is kwok's own folder of them (kwok-stages of tests.cluster.programs)."""
    config = server.folder / "kwok.yaml"
    texts = [(stages / "kustomize" / "stage" / name).read_text(encoding="utf-8") for name in _STAGES]
    config.write_text("\n---\n".join(texts), encoding="utf-8")
    command = [
        program,
        f"--config={config}",
        f"--kubeconfig={server.kubeconfig}",
        "--manage-all-nodes=true",
        "--node-lease-duration-seconds=0",  # no leases: nobody takes a node for lost
        "--node-port=0",  # no server for logs and exec
        "--cidr=10.200.0.0/16",
    ]
    with started(command, server.folder / "kwok.log") as process:
        yield Kwok(process, server.client)


def end_pod(
    client: Client,
    namespace: str,
    name: str,
    *,
    exit_code: int = 0,
    reason: str | None = None,
    message: str = "",
    pod_reason: str | None = None,
    conditions: list[dict[str, Any]] | None = None,
) -> None:
    """All containers of the pod end with `exit_code`, for `reason` (OOMKilled, say).

    `pod_reason` is why the pod as a whole failed (Evicted, NodeLost); `conditions` are added to the pod's, for
    DisruptionTarget.
    """
    path = f"/api/v1/namespaces/{namespace}/pods/{name}"
    pod = client.get(path)
    now = "2025-01-01T00:00:00Z"
    ended = {
        "exitCode": exit_code,
        "reason": reason or ("Error" if exit_code else "Completed"),
        "message": message,
        "startedAt": now,
        "finishedAt": now,
    }
    kept = [one for one in pod["status"].get("conditions") or [] if one["type"] not in ("Ready", "ContainersReady")]
    status = {
        "phase": "Failed" if exit_code or pod_reason else "Succeeded",
        "reason": pod_reason,
        "message": message if pod_reason else None,
        "conditions": [*kept, {"type": "Ready", "status": "False", "reason": "PodFailed"}, *(conditions or [])],
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": False,
                "restartCount": 0,
                "state": {"terminated": ended},
            }
            for container in pod["spec"]["containers"]
        ],
    }
    client.merge(f"{path}/status", {"status": status})


def _is_ready(node: dict[str, Any]) -> bool:
    conditions = node.get("status", {}).get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
