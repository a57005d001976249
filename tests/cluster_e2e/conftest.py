"""Fixtures of the cluster lane: Kubernetes with two real nodes, and the product on it as a platform installs it.

    cluster    two nodes, brought up by tests.cluster; taken down afterwards unless it was up before
    kuberay    KubeRay on it
    product    our chart, installed by Helm with three lines of values
    team       a team's namespace of the strictest Pod Security level, with a claim that all pods share
    job        a job in it: apply, watch; deleted after the test

The first run on a machine builds programs and images, which takes a quarter of an hour. The lane runs only when it is
asked for by name: python -m tests.lanes --lane cluster
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.build import BuildError
from tests.cluster.nodes.cluster import Cluster, down, up
from tests.cluster.nodes.daemons import running
from tests.cluster.nodes.kuberay import install_kuberay
from tests.cluster.nodes.layout import layout
from tests.cluster.nodes.needs import CannotRun
from tests.cluster_e2e.world import World, install, team_in, tiny_job

TEAM = "team-a"

Say = Callable[[str], None]
Submit = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What was installed is looked at first: other scenarios kill the operator and take its nodes away."""
    items.sort(key=lambda item: item.path.name != "test_installing.py")


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Say:
    """Prints at once, whatever pytest does with output: minutes of silence look like a hang."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def said(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n[cluster] {text}", end="", flush=True)

    return said


@pytest.fixture(scope="session")
def cluster(say: Say) -> Iterator[Cluster]:
    was_up = running(layout(), "kube-apiserver")
    try:
        one = up(say)
    except (BuildError, CannotRun) as error:
        pytest.skip(f"no cluster: {error}")
    yield one
    if not was_up:
        assert down() == []


@pytest.fixture(scope="session")
def kuberay(cluster: Cluster, say: Say) -> Cluster:
    install_kuberay(cluster, say)
    return cluster


@pytest.fixture(scope="session")
def product(kuberay: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    install(kuberay, tmp_path_factory.mktemp("values"))
    return kuberay


@pytest.fixture(scope="session")
def team(product: Cluster) -> World:
    return team_in(product, TEAM)


@pytest.fixture(scope="session")
def tiny(team: World) -> dict[str, Any]:
    """A model of a hundred thousand parameters and rows for it, on the claim; what a job says to use them."""
    return tiny_job(team)


@pytest.fixture
def submit(team: World) -> Iterator[Submit]:
    """Applies a job; its name, which begins as asked for. It is deleted after the test, and its pods are gone then.

    No two have the same one: what a run leaves on the claim stays there when its job is deleted.
    """
    names: list[str] = []

    def apply(begins: str, spec: dict[str, Any]) -> str:
        name = f"{begins}-{secrets.token_hex(2)}"
        names.append(name)
        head = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob"}
        team.apply({**head, "metadata": {"name": name}, "spec": spec})
        return name

    yield apply
    for name in names:
        team.delete(name)
