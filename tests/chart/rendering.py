"""Runs Helm on the chart and hands out what it rendered."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from helm.generator.__main__ import CHART

__all__ = ["MATRIX", "NAMESPACE", "RELEASE", "Helm", "HelmError", "Rendered"]

NAMESPACE = "finetune-system"
RELEASE = "finetune-operator"

Document = dict[str, Any]

MATRIX: dict[str, Document] = {
    "defaults": {},
    "some namespaces only": {"watchNamespaces": ["team-a", "team-b"]},
    "everything on": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True, "annotations": {"folder": "Training"}},
        "defaultRuntime": {"enabled": True},
        "service": {"annotations": {"a": "b"}},
        "serviceAccount": {"annotations": {"a": "b"}},
        "networkPolicy": {
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "apiServerCidrs": ["10.0.0.1/32"],
        },
        "image": {"digest": f"sha256:{'a' * 64}"},
        "imagePullSecrets": [{"name": "registry"}],
        "priorityClassName": "system-cluster-critical",
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
        ],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{}]}}},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "commonLabels": {"team": "platform"},
        "podLabels": {"audited": "yes"},
        "podAnnotations": {"a": "b"},
    },
    "everything off": {
        "crds": {"enabled": False},
        "leaderElection": {"enabled": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "rbac": {"create": False},
        "replicas": 1,
        "serviceAccount": {"create": False},
    },
    "another security context": {
        "podSecurityContext": {"runAsUser": 1000, "fsGroup": 1000, "runAsGroup": None},
        "securityContext": {"capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}},
    },
    "one replica": {"replicas": 1},
    "another name": {"fullnameOverride": "tuner", "serviceAccount": {"name": "tuner-account"}},
    "CRDs that go with the release": {"crds": {"keep": False}, "rbac": {"aggregate": False}},
}
"""Values that the chart is rendered with, by what they are about."""


class HelmError(RuntimeError):
    """Helm refused; the message is what it said."""


@dataclass(frozen=True)
class Rendered:
    """The objects of one rendering."""

    documents: tuple[Document, ...]

    def one(self, kind: str, name: str | None = None) -> Document:
        """The only object of a kind, or the one of a name."""
        (found,) = (one for one in self.of(kind) if name in (None, one["metadata"]["name"]))
        return found

    def of(self, kind: str) -> list[Document]:
        """All objects of a kind."""
        return [document for document in self.documents if document["kind"] == kind]

    @property
    def names(self) -> set[tuple[str, str]]:
        """Kind and name of each object."""
        return {(document["kind"], document["metadata"]["name"]) for document in self.documents}

    @property
    def pod(self) -> Document:
        """The spec of the operator's pods."""
        spec: Document = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Document:
        """The operator's container."""
        (container,) = self.pod["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def environment(self) -> dict[str, str]:
        """The container's variables that have a plain value."""
        return {entry["name"]: entry["value"] for entry in self.container["env"] if "value" in entry}


@dataclass(frozen=True)
class Helm:
    """The helm program; what it keeps for itself lies below `folder`, and `kubeconfig` is the cluster it acts on."""

    program: Path
    folder: Path
    kubeconfig: Path | None = None

    def on(self, kubeconfig: Path) -> Helm:
        """The same program for this cluster."""
        return replace(self, kubeconfig=kubeconfig)

    def template(
        self, values: Mapping[str, Any] | None = None, chart: Path = CHART, release: str = RELEASE
    ) -> Rendered:
        """What the chart renders with `values`, hooks included. Raises HelmError."""
        return Rendered(tuple(yaml.safe_load_all(_rendered(self, json.dumps(values or {}), chart, release))))

    def release(
        self,
        verb: str,
        values: Mapping[str, Any] | None = None,
        chart: Path = CHART,
        release: str = RELEASE,
        options: tuple[str, ...] = (),
    ) -> str:
        """What `helm VERB` (template, install, upgrade) prints. Raises HelmError."""
        command = [verb, release, str(chart), "--namespace", NAMESPACE, "--values", "-", *options]
        return self.run(*command, given=json.dumps(values or {}))

    def run(self, *arguments: str, given: str = "") -> str:
        """What `helm ARGUMENTS` prints. Raises HelmError."""
        places = {f"HELM_{kind}_HOME": str(self.folder / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        environment = os.environ | places | {"KUBECONFIG": str(self.kubeconfig or os.devnull)}
        done = subprocess.run(
            [self.program, *arguments], input=given, capture_output=True, text=True, env=environment, timeout=300
        )
        if done.returncode:
            raise HelmError(done.stderr.strip())
        return done.stdout


@cache
def _rendered(helm: Helm, values: str, chart: Path, release: str) -> str:
    """Rendered once for all tests: Helm takes a moment."""
    return helm.release("template", json.loads(values), chart, release)
