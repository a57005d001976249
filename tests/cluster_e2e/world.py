"""A team's namespace on the real cluster: jobs as their user submits and sees them. Used by the scenarios here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.nodes.cluster import Cluster
from tests.trainers.factories import tiny_model, write_rows

__all__ = ["CHART", "CLAIM", "NAMESPACE", "ROOT", "SMALL", "VALUES", "World", "install", "team_in", "tiny_job"]

CLAIM = "shared"
"""A claim in the team's namespace that all pods can mount."""
ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "finetune-operator"
NAMESPACE = "finetune-system"
SMALL = {"workers": {"gpus": 0, "cpus": 1, "memory": "3Gi"}, "head": {"cpus": 0.5, "memory": "3Gi"}}
"""Of a runtime: what fits onto these nodes."""
VALUES = f"""\
defaultRuntime:
  enabled: true
  spec: {json.dumps({**SMALL, "storage": "pvc://shared/runs"})}
"""
"""Of the chart: all that this cluster needs to be told."""
_JOB = "finetune-operator.io/job"
_ATTEMPT = "finetune-operator.io/attempt"
_ROLE = "finetune-operator.io/role"


@dataclass(frozen=True)
class World:
    """`folder` is what the claim holds, as this machine sees it."""

    cluster: Cluster
    namespace: str
    folder: Path

    def apply(self, *documents: Mapping[str, Any]) -> None:
        """kubectl apply, with whatever the API server says against it."""
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """In the team's namespace."""
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, stdin=stdin)

    def finetune(self, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """The command, as its user types it."""
        return subprocess.run(
            [sys.executable, "-m", "finetune_client", *arguments, "-n", self.namespace],
            env=os.environ | {"KUBECONFIG": str(self.cluster.layout.kubeconfig)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def status(self, job: str) -> dict[str, Any]:
        """What the operator says of it; empty while it has said nothing."""
        found = self.cluster.client.find(f"{self._group}/finetunejobs/{job}") or {}
        status: dict[str, Any] = found.get("status", {})
        return status

    def phase(self, job: str) -> str:
        return str(self.status(job).get("phase", ""))

    def step(self, job: str) -> int:
        """Optimizer steps done, as the status tells."""
        return int((self.status(job).get("progress") or {}).get("step") or 0)

    def saved(self, job: str) -> int:
        """The step of the newest checkpoint, 0 while there is none."""
        return int((self.status(job).get("checkpoint") or {}).get("step") or 0)

    def world_size(self, job: str) -> int:
        """Training processes now, 0 before there are any."""
        return int((self.status(job).get("progress") or {}).get("worldSize") or 0)

    def waits_for(self, job: str) -> str:
        """What the status says that its pods wait for."""
        conditions = {one["type"]: one for one in self.status(job).get("conditions", [])}
        return str(conditions.get("ClusterReady", {}).get("message", ""))

    def pods(self, job: str, role: str | None = None, attempt: int | None = None) -> list[dict[str, Any]]:
        """The job's pods that are there, of one role or one attempt."""
        wanted = {_JOB: job} | ({_ROLE: role} if role else {}) | ({_ATTEMPT: str(attempt)} if attempt else {})
        selector = "%2C".join(f"{key}%3D{value}" for key, value in wanted.items())
        return self.cluster.client.items(f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}")

    def steps_made(self, job: str) -> list[int]:
        """Every optimizer step of its first attempt as the metrics tell, in order."""
        return [int(line["step"]) for line in self._lines(job, "metrics.jsonl")]

    def trainings(self, job: str) -> int:
        """How often workers began to train, as its run's reports tell."""
        stages = [line["stage"] for line in self._lines(job, "progress.jsonl")]
        return [stage for stage, _ in itertools.groupby(stages)].count("Training")

    def resumptions(self, job: str) -> list[tuple[int, int]]:
        """Of each group of workers after its run's first one: the step that the one before it told last, and its own
        first."""
        told = [line for line in self._lines(job, "progress.jsonl") if line["stage"] == "Training"]
        groups = [list(lines) for _, lines in itertools.groupby(told, lambda line: line.get("resumedFromStep"))]
        return [(before[-1]["step"], after[0]["resumedFromStep"]) for before, after in itertools.pairwise(groups)]

    def _lines(self, job: str, name: str) -> list[dict[str, Any]]:
        """Of a file in the folder of its first attempt, on the claim; a line that is being written is left out."""
        file = self.folder / "runs" / self.namespace / job / "attempt-1" / name
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait(self, job: str, holds: Callable[[], object], what: str, seconds: float = 300) -> None:
        """Waits for `holds`; when it takes too long, or the job fails meanwhile, says all that is known of it."""
        deadline = time.monotonic() + seconds
        while not holds():
            failed = self.phase(job) == "Failed"
            if failed or time.monotonic() > deadline:
                raise AssertionError(
                    f"{'the job failed' if failed else 'too long'} waiting for {what}\n{self.tell(job)}"
                )
            time.sleep(0.5)

    def tell(self, job: str) -> str:
        """Its status, the events of the namespace, its pods, and the operator's last words."""
        system = ("--namespace", "finetune-system")
        asked = [
            ("get", "events", "--sort-by=.lastTimestamp"),
            ("get", "pods", "--output=wide", "--show-labels"),
            ("get", "rayjobs,rayclusters"),
        ]
        parts = [json.dumps(self.status(job), indent=1)]
        parts += [self.cluster.kubectl.run("--namespace", self.namespace, *one).stdout[-6000:] for one in asked]
        logs = ("logs", "--selector=app.kubernetes.io/name=finetune-operator", "--tail=15", "--prefix")
        parts.append(self.cluster.kubectl.run(*system, *logs).stdout[-6000:])
        return "\n".join(parts)

    def delete(self, job: str) -> None:
        """The job, and with it all that it consists of; waits until its pods are gone."""
        self.kubectl("delete", "finetunejob", job, "--ignore-not-found", "--wait=true", "--timeout=100s")
        deadline = time.monotonic() + 120
        while self.pods(job) and time.monotonic() < deadline:
            time.sleep(0.5)

    @property
    def _group(self) -> str:
        return f"/apis/finetune-operator.io/v1alpha1/namespaces/{self.namespace}"


def install(cluster: Cluster, folder: Path) -> None:
    """Our chart, as a platform installs it; `folder` keeps the values."""
    values = folder / "values.yaml"
    values.write_text(VALUES, encoding="utf-8")
    where = ("--namespace", NAMESPACE, "--create-namespace", "--values", values)
    cluster.helm("upgrade", "--install", "finetune-operator", CHART, *where, "--wait", "--timeout", "110s")


def team_in(cluster: Cluster, namespace: str) -> World:
    """A namespace of the strictest Pod Security level, with a claim that all pods share."""
    folder = cluster.layout.shared
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    size, modes = {"storage": "10Gi"}, ["ReadWriteMany"]
    volume = {"capacity": size, "accessModes": modes, "storageClassName": "", "hostPath": {"path": str(folder)}}
    claim = {
        "resources": {"requests": size},
        "accessModes": modes,
        "storageClassName": "",
        "volumeName": f"{namespace}-{CLAIM}",
    }
    documents = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"{namespace}-{CLAIM}"},
            "spec": volume | {"persistentVolumeReclaimPolicy": "Retain"},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": CLAIM, "namespace": namespace},
            "spec": claim,
        },
    ]
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))
    return World(cluster, namespace, folder)


def tiny_job(team: World) -> dict[str, Any]:
    """A model of a hundred thousand parameters and rows for it, on the claim; what a job says to use them."""
    if not (team.folder / "tiny").exists():
        tiny_model(team.folder / "tiny")
        write_rows(team.folder / "rows.jsonl", 64)
        for file in (team.folder / "tiny").iterdir():  # safetensors are written for their owner's eyes alone
            file.chmod(0o644)
    return {
        "model": {"source": f"pvc://{CLAIM}/tiny"},
        "data": {"train": [{"source": f"pvc://{CLAIM}/rows.jsonl"}]},
        "method": {"sft": {"maxSeqLength": 128}},
        "tuning": {"lora": {"rank": 4}},
        "training": {"maxSteps": 40, "globalBatchSize": 4, "precision": "fp32", "learningRate": 0.001},
        "runtimeRef": {"name": "default"},
    }
