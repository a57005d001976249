"""Fixtures of the control plane lane: a real API server that has our CRDs, and what acts on its objects.

    server           the API server: address, token, authority, kubeconfig; nothing acts on its objects
    api              a client of it, once our kinds are served
    controllers      kube-controller-manager: garbage collection, namespaces, service accounts, Jobs
    namespace        the name of a namespace for one test
    jobs             FineTuneJobs in it, as their user sees them
    kubectl, helm    the real programs
    faults           a proxy for a program to reach the server through, which misbehaves as it is told
    kuberay          KubeRay's operator, and the Ray jobs that it sees
    nodes            fake nodes with GPUs, on which pods are scheduled and run
    kueue            Kueue, for RayJobs that name a queue

A test pays for what it asks for, and most of it starts once in a session. KubeRay acts on every RayJob that it sees,
and therefore ends with the module that asked for it. Kueue acts on RayJobs that name a queue, and judges all of them;
it stays. The first run on a machine builds the programs, which takes minutes; they are kept. A test whose programs
cannot be built is skipped with the reason.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.build import BuildError, files_path, program_path
from tests.cluster.client import Client
from tests.cluster.controllers import kube_controller_manager, kube_scheduler
from tests.cluster.crds import CRDS, define
from tests.cluster.faults import Faults, fault_proxy
from tests.cluster.kuberay import KubeRay, define_ray
from tests.cluster.kuberay import kuberay as start_kuberay
from tests.cluster.kueue import kueue as start_kueue
from tests.cluster.pods import Kwok, kwok
from tests.cluster.processes import Started, wait_until
from tests.cluster.programs import PROGRAMS
from tests.cluster.server import Server, control_plane
from tests.cluster.tools import Tool, helm_tool, kubectl_tool
from tests.control_plane.operators import Jobs

ROOT = Path(__file__).resolve().parents[2]
JOBS = "/apis/finetune-operator.io/v1alpha1/namespaces/default/finetunejobs"
RUNTIMES = "/apis/finetune-operator.io/v1alpha1/finetuneruntimes"

Store = Callable[[dict[str, Any]], dict[str, Any]]
Built = Callable[[str], Path]


@pytest.fixture(scope="session")
def built(pytestconfig: pytest.Config) -> Built:
    """Where a program is, or a folder of files, by its name in tests.cluster.programs."""
    say = _past_the_capture(pytestconfig)

    def path(name: str) -> Path:
        try:
            return program_path(name, say) if name in PROGRAMS else files_path(name, say)
        except BuildError as error:
            pytest.skip(f"no {name}: {error}")

    return path


@pytest.fixture(scope="session")
def server(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    etcd, kube_apiserver = built("etcd"), built("kube-apiserver")
    with control_plane(etcd, kube_apiserver, tmp_path_factory.mktemp("control-plane")) as server:
        yield server


@pytest.fixture(scope="session")
def stored_crds(server: Server) -> dict[str, dict[str, Any]]:
    """Our CRDs as the server holds them once it serves them, by plural name."""
    files = sorted((ROOT / "manifests/crd").iterdir())
    manifests = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    define(server.client, manifests)
    names = {manifest["spec"]["names"]["plural"]: manifest["metadata"]["name"] for manifest in manifests}
    return {plural: server.client.get(f"{CRDS}/{name}") for plural, name in names.items()}


@pytest.fixture
def api(server: Server, stored_crds: dict[str, dict[str, Any]]) -> Client:
    return server.client


@pytest.fixture(scope="session")
def controllers(server: Server, stored_crds: dict[str, dict[str, Any]], built: Built) -> Iterator[Started]:
    define_ray(server.client, built("kuberay-manifests"))  # before the garbage collector looks which kinds there are
    with kube_controller_manager(built("kube-controller-manager"), server) as process:
        yield process


@pytest.fixture
def namespace(api: Client, controllers: Started) -> Iterator[str]:
    """Its service account is there, so pods may be created. Deleted afterwards with all that is in it, unattended."""
    name = f"test-{secrets.token_hex(4)}"
    api.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_until(lambda: api.find(account), "the namespace's service account", controllers)
    yield name
    api.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture
def jobs(api: Client, namespace: str) -> Jobs:
    return Jobs(api, namespace)


@pytest.fixture(scope="session")
def kubectl(
    server: Server, stored_crds: dict[str, dict[str, Any]], built: Built, tmp_path_factory: pytest.TempPathFactory
) -> Tool:
    """kubectl as an administrator: `kubectl("get", "ftj", "-n", namespace)` is what it prints."""
    return kubectl_tool(built("kubectl"), server.kubeconfig, tmp_path_factory.mktemp("kubectl"))


@pytest.fixture(scope="session")
def helm(server: Server, built: Built, tmp_path_factory: pytest.TempPathFactory) -> Tool:
    """Helm as an administrator."""
    return helm_tool(built("helm"), server.kubeconfig, tmp_path_factory.mktemp("helm"))


@pytest.fixture
def faults(server: Server, stored_crds: dict[str, dict[str, Any]]) -> Iterator[Faults]:
    with fault_proxy(server) as faults:
        yield faults


@pytest.fixture(scope="module")
def kuberay(server: Server, controllers: Started, built: Built) -> Iterator[KubeRay]:
    with start_kuberay(built("kuberay"), server) as operator:
        yield operator


@pytest.fixture(scope="session")
def nodes(server: Server, controllers: Started, built: Built) -> Iterator[Kwok]:
    """Four nodes with eight GPUs each."""
    programs = built("kube-scheduler"), built("kwok"), built("kwok-stages")
    with kube_scheduler(programs[0], server), kwok(programs[1], programs[2], server) as kubelets:
        for number in range(4):
            kubelets.add_node(f"node-{number}")
        yield kubelets


@pytest.fixture(scope="session")
def kueue(server: Server, controllers: Started, built: Built) -> Iterator[Started]:
    programs = built("kueue"), built("kueue-manifests")
    with start_kueue(*programs, server.client, server.kubeconfig, server.folder / "kueue") as process:
        yield process


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
        api.delete(f"{JOBS}/{name}")


def _past_the_capture(config: pytest.Config) -> Callable[[str], None]:
    """Prints at once, whatever pytest does with output: minutes of silence look like a hang."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n[control plane] {text}", end="", flush=True)

    return say
