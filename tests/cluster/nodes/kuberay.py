"""KubeRay on the cluster: its own deployment, out of its Go module, with the image that we made of its operator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from tests.cluster.build import files_path
from tests.cluster.images import KUBERAY
from tests.cluster.nodes.cluster import Cluster

__all__ = ["install_kuberay", "kustomization"]

NAMESPACE = "ray-system"


def install_kuberay(cluster: Cluster, say: Callable[[str], None]) -> None:
    """Applies it and waits until it is available."""
    folder = cluster.layout.root / "kuberay"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files_path("kuberay-deployment", say) / "config", folder)
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization()), encoding="utf-8")
    (folder / "namespace.yaml").write_text(json.dumps(_namespace()), encoding="utf-8")
    # The CRDs are too large for the annotation in which kubectl otherwise keeps what it applied.
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-k", folder)
    wait = ("rollout", "status", "deployment/kuberay-operator", "--timeout=110s")
    cluster.kubectl("--namespace", NAMESPACE, *wait)


def kustomization() -> dict[str, Any]:
    """The operator's own folders, with what the chart's README asks of a KubeRay that is there already.

    A tenth of a core, its default, makes it slow to start and to submit; nothing here depends on that.
    """
    container = "/spec/template/spec/containers/0"
    changes = [
        {"op": "add", "path": f"{container}/args/-", "value": "--reconcile-concurrency=10"},
        {"op": "replace", "path": f"{container}/resources/limits/cpu", "value": "1"},
        {"op": "replace", "path": f"{container}/readinessProbe/initialDelaySeconds", "value": 1},
    ]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["namespace.yaml", "crd", "rbac", "manager"],
        "images": [{"name": "kuberay/operator", "newName": KUBERAY.rpartition(":")[0], "newTag": "1"}],
        "patches": [{"target": {"kind": "Deployment"}, "patch": json.dumps(changes)}],
    }


def _namespace() -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
