"""Fixtures of the control plane lane: a real API server that has our CRDs.

The first run on a machine builds etcd and kube-apiserver, which takes minutes; they are kept. Where they
cannot be built the lane is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.build import BuildError, program_path
from tests.cluster.server import ApiError, Client, control_plane, wait_until

ROOT = Path(__file__).resolve().parents[2]
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
JOBS = "/apis/finetune-operator.io/v1alpha1/namespaces/default/finetunejobs"
RUNTIMES = "/apis/finetune-operator.io/v1alpha1/finetuneruntimes"

Store = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Client]:
    """A client of an API server that was started for this session."""
    say = _past_the_capture(pytestconfig)
    try:
        etcd, kube_apiserver = program_path("etcd", say), program_path("kube-apiserver", say)
    except BuildError as error:
        pytest.skip(f"no API server: {error}")
    with control_plane(etcd, kube_apiserver, tmp_path_factory.mktemp("control-plane")) as client:
        yield client


@pytest.fixture(scope="session")
def stored_crds(server: Client) -> dict[str, dict[str, Any]]:
    """Our CRDs as the server holds them once it serves them, by plural name."""
    manifests = [
        yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "manifests/crd").iterdir())
    ]
    for manifest in manifests:
        server.create(CRDS, manifest)
    names = {manifest["spec"]["names"]["plural"]: manifest["metadata"]["name"] for manifest in manifests}
    wait_until(lambda: all(_established(server, name) for name in names.values()), "the CRDs to be established")
    wait_until(lambda: names.keys() <= _served(server), "our kinds to be served, which comes a moment later")
    return {plural: server.get(f"{CRDS}/{name}") for plural, name in names.items()}


@pytest.fixture
def api(server: Client, stored_crds: dict[str, dict[str, Any]]) -> Client:
    """The client, once our kinds are served."""
    return server


@pytest.fixture
def stored_job(api: Client) -> Iterator[Store]:
    """Stores a job document for the length of one test and returns it as the server does."""
    names = []

    def store(document: dict[str, Any]) -> dict[str, Any]:
        stored: dict[str, Any] = api.create(f"{JOBS}?fieldValidation=Strict", document)
        names.append(stored["metadata"]["name"])
        return stored

    yield store
    for name in names:
        api.request("DELETE", f"{JOBS}/{name}")


def _established(server: Client, name: str) -> bool:
    listed = server.get(f"{CRDS}/{name}").get("status", {}).get("conditions") or []
    return any(condition["type"] == "Established" and condition["status"] == "True" for condition in listed)


def _served(server: Client) -> set[str]:
    """The plural names in our group; the group itself appears with the first."""
    try:
        listed = server.get("/apis/finetune-operator.io/v1alpha1")
    except ApiError:
        return set()
    return {resource["name"] for resource in listed["resources"]}


def _past_the_capture(config: pytest.Config) -> Callable[[str], None]:
    """Prints at once, whatever pytest does with output: minutes of silence look like a hang."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n[control plane] {text}", end="", flush=True)

    return say
