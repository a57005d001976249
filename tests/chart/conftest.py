"""Fixtures of the chart's tests: the real Helm, and an API server that knows nothing of us until Helm installs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chart.rendering import Helm
from tests.cluster.server import Server, control_plane
from tests.cluster.tools import helm_tool
from tests.control_plane.conftest import Built, built

__all__ = ["bare_server", "built", "helm"]


@pytest.fixture(scope="session")
def helm(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The real Helm, which knows of no cluster."""
    return Helm(helm_tool(built("helm"), Path(os.devnull), tmp_path_factory.mktemp("helm")))


@pytest.fixture(scope="session")
def bare_server(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An API server without our CRDs."""
    with control_plane(built("etcd"), built("kube-apiserver"), tmp_path_factory.mktemp("chart")) as server:
        yield server
