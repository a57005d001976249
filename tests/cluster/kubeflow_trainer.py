"""Kubeflow Trainer's controller with the settings that it is shipped with, for a benchmark to compare ours with.

Only the JobSet CRD is there, no JobSet controller: a TrainJob's JobSet is created and nobody acts on it.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.client import Client
from tests.cluster.crds import define, define_files
from tests.cluster.processes import Started, reserved_ports, started, wait_until
from tests.cluster.server import Server
from tests.cluster.webhooks import answers, documents_of, registered

__all__ = ["RUNTIME", "TRAIN_JOBS", "kubeflow_trainer", "train_job"]

RUNTIME = "torch-distributed"
TRAIN_JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs"

_NAMES = {
    "MutatingWebhookConfiguration": "defaulter.trainer.kubeflow.org",
    "ValidatingWebhookConfiguration": "validator.trainer.kubeflow.org",
}


@contextmanager
def kubeflow_trainer(program: Path, manifests: Path, jobset: Path, server: Server) -> Iterator[Started]:
    """Starts it with the runtime RUNTIME defined.

    `manifests` and `jobset` are kubeflow-trainer-manifests and jobset-manifests of tests.cluster.programs.
    """
    client, base, folder = server.client, manifests / "manifests" / "base", server.folder / "kubeflow-trainer"
    _define(client, base, jobset)
    # Its webhook server reads its certificate here, below TMPDIR.
    certificates = folder / "k8s-webhook-server" / "serving-certs"
    certificates.mkdir(parents=True, exist_ok=True)
    shutil.copy(server.ca_file, certificates / "tls.crt")
    shutil.copy(server.key_file, certificates / "tls.key")
    with reserved_ports(2) as (port, health):
        config = folder / "config.json"
        config.write_text(json.dumps(_configuration(port, health)), encoding="utf-8")
        environment = {"KUBECONFIG": str(server.kubeconfig), "TMPDIR": str(folder)}
        authority = base64.b64encode(server.ca_file.read_bytes()).decode()

        def at(path: str) -> dict[str, Any]:
            return {"url": f"https://127.0.0.1:{port}{path}", "caBundle": authority}

        with started([program, f"--config={config}"], server.folder / "kubeflow-trainer.log", environment) as process:
            wait_until(lambda: answers(f"http://127.0.0.1:{health}/readyz"), "Kubeflow Trainer to be ready", process)
            with registered(client, _configurations(base / "webhook" / "manifests.yaml"), at):
                (runtime,) = documents_of(base / "runtimes" / "torch_distributed.yaml")
                client.apply(f"/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/{RUNTIME}", runtime)
                yield process


def train_job(name: str, nodes: int = 1) -> dict[str, Any]:
    """A TrainJob on RUNTIME."""
    spec = {"runtimeRef": {"name": RUNTIME}, "trainer": {"numNodes": nodes}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": spec,
    }


def _define(client: Client, base: Path, jobset: Path) -> None:
    define_files(client, sorted((jobset / "config" / "components" / "crd" / "bases").iterdir()))
    crds = sorted((base / "crds").glob("trainer.kubeflow.org_*.yaml"))
    define(client, [document for file in crds for document in documents_of(file)])


def _configuration(port: int, health: int) -> dict[str, Any]:
    """Besides where it listens, what its own installation sets: 50 requests a second, 5 jobs at a time."""
    return {
        "apiVersion": "config.trainer.kubeflow.org/v1alpha1",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": port},
        "leaderElection": {"leaderElect": False},
        "certManagement": {"enable": False},
        "controller": {
            "groupKindConcurrency": {
                "TrainJob.trainer.kubeflow.org": 5,
                "TrainingRuntime.trainer.kubeflow.org": 1,
                "ClusterTrainingRuntime.trainer.kubeflow.org": 1,
            }
        },
        "clientConnection": {"qps": 50, "burst": 100},
    }


def _configurations(file: Path) -> Iterator[dict[str, Any]]:
    for configuration in documents_of(file):
        configuration["metadata"]["name"] = _NAMES[configuration["kind"]]
        yield configuration
