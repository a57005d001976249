"""Runs Helm on the chart and hands out what it rendered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helm.generator.__main__ import CHART
from tests.cluster.tools import Tool

__all__ = ["MATRIX", "NAMESPACE", "RELEASE", "Helm", "Rendered"]

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
    """The helm program, acting on the chart."""

    tool: Tool

    def template(self, values: Mapping[str, Any] | None = None, chart: Path = CHART) -> Rendered:
        """What the chart renders with `values`, hooks included. Raises ToolFailed."""
        key = json.dumps([values or {}, str(chart)])
        if key not in _rendered:  # Helm takes a moment, and many tests look at the same
            _rendered[key] = self.release("template", values, chart)
        return Rendered(tuple(yaml.safe_load_all(_rendered[key])))

    def release(
        self, verb: str, values: Mapping[str, Any] | None = None, chart: Path = CHART, options: Iterable[str] = ()
    ) -> str:
        """What `helm VERB` (template, install, upgrade) prints. Raises ToolFailed."""
        command: tuple[str | Path, ...] = (verb, RELEASE, chart, "--namespace", NAMESPACE, "--values", "-", *options)
        return self.tool(*command, stdin=json.dumps(values or {}))


_rendered: dict[str, str] = {}
