"""Custom resource definitions are given to a server, and waited for until it serves them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.cluster.client import Client
from tests.cluster.processes import wait_until

__all__ = ["CRDS", "define", "define_files"]

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def define_files(client: Client, files: Iterable[Path]) -> None:
    """Applies files named GROUP_PLURAL.yaml, as controller-gen writes them, unread: some have more than a megabyte."""
    texts = {".".join(reversed(file.stem.split("_", 1))): file.read_text(encoding="utf-8") for file in files}
    _define(client, texts)


def define(client: Client, manifests: Iterable[dict[str, Any]]) -> None:
    """Applies CRDs."""
    _define(client, {manifest["metadata"]["name"]: manifest for manifest in manifests})


def _define(client: Client, manifests: dict[str, Any]) -> None:
    for name, manifest in manifests.items():
        client.apply(f"{CRDS}/{name}", manifest)
    wait_until(lambda: all(_is_served(client, name) for name in manifests), f"{', '.join(manifests)} to be served")


def _is_served(client: Client, name: str) -> bool:
    """Established, and answering, which comes a moment later."""
    crd = client.get(f"{CRDS}/{name}")
    conditions = crd.get("status", {}).get("conditions") or []
    if not any(condition["type"] == "Established" and condition["status"] == "True" for condition in conditions):
        return False
    # The stored version alone: asked for another, a server keeps converting to it for as long as it runs.
    stored = next(version["name"] for version in crd["spec"]["versions"] if version["storage"])
    group, plural = crd["spec"]["group"], crd["spec"]["names"]["plural"]
    return client.find(f"/apis/{group}/{stored}/{plural}?limit=1") is not None
