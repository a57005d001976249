"""A Kubernetes cluster with real nodes on this machine: brought up, taken down. `python -m tests.cluster` and the lane
of tests that need it call this.

It consists of real programs: etcd, Kubernetes' control plane, and on each of two nodes containerd, kubelet and
kube-proxy; CoreDNS runs in a pod. Each node has a network namespace of its own (see `layout`).
"""

from __future__ import annotations

import json
import shutil
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.cluster.build import program_path
from tests.cluster.client import ApiError, Client
from tests.cluster.images import Images, ready_images
from tests.cluster.nodes import daemons, machine, needs
from tests.cluster.nodes.certificates import new_authority, new_key
from tests.cluster.nodes.configs import coredns_objects, kubeconfig
from tests.cluster.nodes.control import CONTROL_PLANE, SERVER_NAMES, SERVER_PORT, start_control_plane
from tests.cluster.nodes.layout import NODES, Layout, Node, layout
from tests.cluster.nodes.node import lose_node, start_node, stop_node
from tests.cluster.tools import Tool, helm_tool, kubectl_tool

__all__ = ["Cluster", "down", "up"]

PROGRAMS = (
    *("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    *("kubelet", "kube-proxy", "kubectl", "helm"),
)
_USERS = {
    "kube-controller-manager": "system:kube-controller-manager",
    "kube-scheduler": "system:kube-scheduler",
    "kube-proxy": "system:kube-proxy",
}
_ADMINISTRATORS = "system:masters"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    layout: Layout
    programs: Mapping[str, Path]
    images: Images

    @cached_property
    def client(self) -> Client:
        """As an administrator."""
        tls = ssl.create_default_context(cafile=str(self.layout.pki / "ca.crt"))
        tls.load_cert_chain(self.layout.pki / "admin.crt", self.layout.pki / "admin.key")
        return Client(f"https://{NODES[0].address}:{SERVER_PORT}", "", tls)

    @cached_property
    def kubectl(self) -> Tool:
        return kubectl_tool(self.programs["kubectl"], self.layout.kubeconfig, self._home("kubectl"))

    @cached_property
    def helm(self) -> Tool:
        return helm_tool(self.programs["helm"], self.layout.kubeconfig, self._home("helm"))

    def lose(self, node: Node) -> None:
        """Everything on the node is gone at once. Not for the first node, which holds the control plane."""
        lose_node(self.layout, node)

    def restore(self, node: Node) -> None:
        """The node comes back empty, as a new machine under its old name."""
        stop_node(self.layout, node)
        machine.make_namespace(node, NODES[0])
        start_node(self.layout, node, self.programs, self.images)
        self.wait_ready(node)

    def wait_ready(self, node: Node) -> None:
        """Until its kubelet says that it takes pods."""
        daemons.wait(self.layout, lambda: self._ready(node), f"{node.name} to be ready", f"{node.name}-kubelet")

    def _ready(self, node: Node) -> bool:
        found = self.client.find(f"/api/v1/nodes/{node.name}") or {}
        conditions = found.get("status", {}).get("conditions", [])
        taints = found.get("spec", {}).get("taints", [])
        return not taints and any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def _home(self, name: str) -> Path:
        folder = self.layout.root / name
        folder.mkdir(exist_ok=True)
        return folder


def up(say: Say, install: bool = False) -> Cluster:
    """Brings the cluster up, or finds it up and gives its nodes our code as it is now.

    Raises CannotRun, BuildError, DaemonFailed or OSError, each with a reason; what was begun is taken down then.
    """
    needs.check(install, say)
    place, programs = layout(), {name: program_path(name, say) for name in PROGRAMS}
    cluster = Cluster(place, programs, ready_images(say))
    is_other = _store_of(place) != cluster.images.store.name  # nodes that began with other packages
    is_new = is_other or not daemons.running(place, "kube-apiserver")  # or what is left of one whose processes are gone
    if is_new:
        down()
    try:
        _bring_up(cluster, is_new, say)
    except BaseException:  # Ctrl-C too
        if is_new:
            say(f"taking down what was begun; its logs stay in {place.logs}")
            down()
        raise
    return cluster


def _bring_up(cluster: Cluster, is_new: bool, say: Say) -> None:
    """All of it, until DNS answers."""
    place, programs, began = cluster.layout, cluster.programs, time.monotonic()

    def tell(what: str) -> None:
        say(f"{time.monotonic() - began:5.1f} s  {what}")

    if is_new:
        _prepare(place)
        _identities(place).write_text(cluster.images.store.name, encoding="utf-8")
    for node in NODES:
        machine.make_namespace(node, NODES[0])
    start_control_plane(place, NODES[0], programs)
    for node in NODES:
        start_node(place, node, programs, cluster.images)
        tell(f"{node.name} has its images")
    daemons.wait(place, lambda: _answers(cluster.client), "the API server", "etcd", "kube-apiserver")
    tell("the API server answers")
    for document in coredns_objects():
        _apply(cluster.client, document)
    for node in NODES:
        cluster.wait_ready(node)
        tell(f"{node.name} is ready")
    dns = "/apis/apps/v1/namespaces/kube-system/deployments/coredns"
    daemons.wait(place, lambda: cluster.client.get(dns)["status"].get("readyReplicas"), "DNS", *CONTROL_PLANE)
    tell("DNS answers")


def down(keep_logs: bool = True) -> list[str]:
    """Takes all of it away, whatever of it there is: processes, pods, namespaces, mounts, groups, settings, files.

    Says what is there all the same.
    """
    place = layout()
    for node in reversed(NODES[1:]):
        stop_node(place, node)
    for name in CONTROL_PLANE:
        daemons.kill(place, name)  # nobody needs what it would still write
    stop_node(place, NODES[0])
    machine.restore_settings(place)
    left = machine.left_behind(place)
    shutil.rmtree(place.run, ignore_errors=True)
    for path in place.root.iterdir() if place.root.exists() else ():
        if path.is_dir() and not (keep_logs and path == place.logs):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    return left


def _prepare(place: Layout) -> None:
    """Folders, and what the machine was like."""
    for folder in (place.root, place.run, place.pki, place.shared):
        folder.mkdir(parents=True, exist_ok=True)
    place.shared.chmod(0o777)  # as a file system for everybody is
    machine.keep_settings(place)
    _write_identities(place)


def _identities(place: Layout) -> Path:
    """The file that is there when all certificates are; it says which packages the nodes began with."""
    return place.run / "identities"


def _store_of(place: Layout) -> str | None:
    """The name of the packages that a cluster which is up began with."""
    file = _identities(place)
    return file.read_text(encoding="utf-8") if file.exists() else None


def _write_identities(place: Layout) -> None:
    """A certificate for everybody, and how they reach the API server."""
    first = NODES[0].address
    authority = new_authority(place.pki)
    authority.issue("etcd", "etcd", addresses=[first])
    authority.issue("apiserver", "kube-apiserver", addresses=[*SERVER_NAMES, first])
    authority.issue("kubelet-client", "kube-apiserver", [_ADMINISTRATORS])
    new_key(place.pki / "accounts.key")
    users: list[tuple[str, str, list[str]]] = [(name, user, []) for name, user in _USERS.items()]
    users += [(node.name, f"system:node:{node.name}", ["system:nodes"]) for node in NODES]
    addresses = {node.name: [node.name, node.address] for node in NODES}
    for name, user, groups in users:
        authority.issue(name, user, groups, addresses.get(name, []))
        _write_kubeconfig(place, place.run / f"{name}.kubeconfig", name)
    (place.run / "resolv.conf").touch()
    authority.issue("admin", "admin", [_ADMINISTRATORS])
    _write_kubeconfig(place, place.kubeconfig, "admin")


def _write_kubeconfig(place: Layout, file: Path, name: str) -> None:
    server = f"https://{NODES[0].address}:{SERVER_PORT}"
    document = kubeconfig(server, place.pki / "ca.crt", place.pki / f"{name}.crt")
    file.write_text(json.dumps(document, indent=2), encoding="utf-8")
    file.chmod(0o600)


def _answers(client: Client) -> bool:
    try:
        return client.get("/readyz") == "ok" and client.find("/api/v1/namespaces/kube-system") is not None
    except (ApiError, OSError):
        return False


_PATHS = {
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Service": "/api/v1/namespaces/{}/services",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}


def _apply(client: Client, document: dict[str, Any]) -> None:
    metadata = document["metadata"]
    path = _PATHS[document["kind"]].format(metadata.get("namespace"))
    client.apply(f"{path}/{metadata['name']}", document)
