"""The real Kueue, for RayJobs, as a process beside the API server.

Kueue makes its own certificate, for the name of a Service in the cluster. Here that Service is of the kind that is
only another name, this process's address: the API server then calls the webhooks where they are, under the name that
the certificate has. What a kubelet would do, mounting the certificate's Secret, is done here.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.client import Client
from tests.cluster.crds import CRDS, define
from tests.cluster.processes import Started, reserved_ports, started, wait_until
from tests.cluster.webhooks import answers, documents_of, registered

__all__ = ["kueue"]

_NAMESPACE = "kueue-system"
_SERVICE = "kueue-webhook-service"
_SECRET = "kueue-webhook-server-cert"
_JUDGED = ("clusterqueue", "cohort", "localqueue", "rayjob", "resourceflavor", "workload")
"""Kinds whose webhooks are used. Those of frameworks that are switched off would find nobody to answer."""


@contextmanager
def kueue(
    program: Path, manifests: Path, client: Client, kubeconfig: Path, folder: Path, address: str = "127.0.0.1"
) -> Iterator[Started]:
    """`manifests` is kueue-manifests of tests.cluster.programs; the API server must have KubeRay's CRDs, and finds the
    webhooks at `address` of this machine. `folder` is Kueue's own, made here.

    Jobs without a queue's name are left alone.
    """
    components = manifests / "config" / "components"
    folder.mkdir(exist_ok=True)
    with reserved_ports(2) as (port, health):
        config = folder / "config.json"
        config.write_text(json.dumps(_configuration(folder, address, port, health)), encoding="utf-8")
        command = [program, f"--config={config}", "--feature-gates=VisibilityOnDemand=false"]
        environment = {"KUBECONFIG": str(kubeconfig)}

        def service(path: str) -> dict[str, Any]:
            return {"service": {"namespace": _NAMESPACE, "name": _SERVICE, "port": port, "path": path}}

        _prepare(client, address)
        with (
            _converting(client, list(_crds(components / "crd", service("/convert")))),
            registered(client, _configurations(components / "webhook"), service) as webhooks,
            started(command, folder.with_suffix(".log"), environment) as process,
        ):
            wait_until(lambda: _mount(client, folder), "Kueue's certificate", process)
            wait_until(lambda: answers(f"http://127.0.0.1:{health}/readyz"), "Kueue to be ready", process)
            wait_until(lambda: _trusted(client, webhooks), "Kueue's webhooks to be trusted", process)
            yield process


def _configuration(certificates: Path, address: str, port: int, health: int) -> dict[str, Any]:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": _NAMESPACE,
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": address, "port": port, "certDir": str(certificates)},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {
            "enable": True,
            "webhookServiceName": _SERVICE,
            "webhookSecretName": _SECRET,
        },
        "integrations": {"frameworks": ["ray.io/rayjob"]},
    }


def _prepare(client: Client, address: str) -> None:
    """What Kueue expects to find: its namespace, an empty Secret for the certificate, the Service."""
    inside = f"/api/v1/namespaces/{_NAMESPACE}"
    client.apply(inside, _named("Namespace", _NAMESPACE))
    client.apply(f"{inside}/secrets/{_SECRET}", _named("Secret", _SECRET))
    service = _named("Service", _SERVICE) | {"spec": {"type": "ExternalName", "externalName": address}}
    client.apply(f"{inside}/services/{_SERVICE}", service)


@contextmanager
def _converting(client: Client, crds: list[dict[str, Any]]) -> Iterator[None]:
    """Kueue's kinds, converted by Kueue for the length of a block; afterwards nobody is asked who is not there."""
    define(client, crds)
    try:
        yield
    finally:
        for crd in crds:
            nobody = {"conversion": {"strategy": "None", "webhook": None}}
            client.merge(f"{CRDS}/{crd['metadata']['name']}", {"spec": nobody})


def _crds(folder: Path, conversion: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Kueue converts between the versions of those that its own kustomization patches so."""
    (kustomization,) = documents_of(folder / "kustomization.yaml")
    patches = [Path(patch["path"]).stem for patch in kustomization["patches"]]
    for file in sorted((folder / "bases").iterdir()):
        (crd,) = documents_of(file)
        if f"webhook_in_{crd['spec']['names']['plural']}" in patches:
            webhook = {"clientConfig": conversion, "conversionReviewVersions": ["v1"]}
            crd["spec"]["conversion"] = {"strategy": "Webhook", "webhook": webhook}
        yield crd


def _configurations(folder: Path) -> Iterator[dict[str, Any]]:
    for configuration in documents_of(folder / "manifests.yaml"):
        configuration["metadata"]["name"] = f"kueue-{configuration['metadata']['name']}"
        # The first part of a name is m or v, and the kind.
        webhooks = configuration["webhooks"]
        configuration["webhooks"] = [one for one in webhooks if one["name"].partition(".")[0][1:] in _JUDGED]
        yield configuration


def _mount(client: Client, folder: Path) -> bool:
    """Writes the Secret's entries as files once there are any: each whole, and last the one that Kueue waits for."""
    data = client.get(f"/api/v1/namespaces/{_NAMESPACE}/secrets/{_SECRET}").get("data") or {}
    for name in sorted(data, key=lambda name: (name == "tls.crt", name)):
        unfinished = folder.parent / f"kueue-{name}"
        unfinished.write_bytes(base64.b64decode(data[name]))
        unfinished.replace(folder / name)
    return bool(data)


def _trusted(client: Client, configurations: list[str]) -> bool:
    """Whether Kueue has written its authority into every webhook."""
    webhooks = [webhook for path in configurations for webhook in client.get(path)["webhooks"]]
    return all(webhook["clientConfig"].get("caBundle") for webhook in webhooks)


def _named(kind: str, name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
