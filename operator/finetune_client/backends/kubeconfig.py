"""In which context and namespace a person works, as kubectl would know: the kubeconfig's, or the pod's own.

Used by the backend for Kubernetes. How to reach and to trust a server is read by `finetune_operator.cluster`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune_client.errors import Unreachable
from finetune_operator.raw import at, items, text

__all__ = ["Place", "place_of"]

_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Place(NamedTuple):
    """Where a person works."""

    context: str | None
    """None where no kubeconfig says any."""
    namespace: str


def place_of(kubeconfig: Path | None, context: str | None) -> Place:
    """The context that counts, and the namespace for jobs that name none.

    Of several files in $KUBECONFIG the first that says something counts. Raises Unreachable for a context that is in
    none of them.
    """
    files = _files(kubeconfig)
    if not files:
        return Place(context, _own_namespace() or "default")
    documents = [document for file in files for document in _read(file)]
    contexts = {text(one, "name"): one for document in reversed(documents) for one in items(document, "contexts")}
    chosen = context or next(filter(None, (text(one, "current-context") for one in documents)), "")
    if chosen and chosen not in contexts:
        where = ", ".join(str(file) for file in files)
        known = ", ".join(sorted(contexts)) or "none"
        raise Unreachable(f"{where} has no context called {chosen}; choose one with --context: {known}")
    return Place(chosen or None, text(contexts.get(chosen), "context", "namespace") or "default")


def _files(kubeconfig: Path | None) -> list[Path]:
    """Those that are there; none where a pod's service account is used."""
    if kubeconfig is not None:
        named = [str(kubeconfig)]
    elif given := os.environ.get("KUBECONFIG"):
        named = given.split(os.pathsep)
    elif os.environ.get("KUBERNETES_SERVICE_HOST"):
        named = []
    else:
        named = [str(Path.home() / ".kube" / "config")]
    return [Path(one) for one in named if one and Path(one).is_file()]


def _read(file: Path) -> Iterator[Any]:
    """The file's document; what cannot be read is the connection's to complain about."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    if at(document, "contexts") is not None:
        yield document


def _own_namespace() -> str:
    try:
        return _ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
