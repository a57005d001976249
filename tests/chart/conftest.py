"""Fixtures of the chart's tests: the real Helm, and an API server that knows nothing of us until Helm installs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chart.rendering import Helm
from tests.cluster.build import BuildError, program_path
from tests.cluster.server import Server, control_plane
from tests.cluster.tools import helm_tool

Programs = Callable[[str], Path]


@pytest.fixture(scope="session")
def program(pytestconfig: pytest.Config) -> Programs:
    """Where a program is, built from its Go module when this machine has not done so yet."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        # At once, whatever pytest does with output: minutes of silence look like a hang.
        with capture.global_and_fixture_disabled():
            print(f"\n[chart] {text}", end="", flush=True)

    def path(name: str) -> Path:
        try:
            return program_path(name, say)
        except BuildError as error:
            pytest.skip(f"no {name}: {error}")

    return path


@pytest.fixture(scope="session")
def helm(program: Programs, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The real Helm, which knows of no cluster."""
    return Helm(helm_tool(program("helm"), Path(os.devnull), tmp_path_factory.mktemp("helm")))


@pytest.fixture(scope="session")
def bare_server(program: Programs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An API server without our CRDs."""
    etcd, kube_apiserver = program("etcd"), program("kube-apiserver")
    with control_plane(etcd, kube_apiserver, tmp_path_factory.mktemp("chart")) as server:
        yield server
