"""Where everything of the cluster is: folders on this machine, addresses in its namespaces. Nothing is done here.

    this machine ──veth── bridge ── pods of node-1          namespace of node-1, with the control plane
    10.213.0.254             └──veth── node-2 ── bridge ── pods of node-2          namespace of node-2

The namespaces have no way out: no image is pulled, no name outside is resolved, and the machine's own rules, routes and
forwarding stay as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.build import cache_folder

__all__ = ["API_ADDRESS", "DNS_ADDRESS", "HOST_ADDRESS", "NETWORK", "NODES", "SERVICES", "Layout", "Node", "layout"]

NETWORK = "10.208.0.0/12"
"""Everything below."""
SERVICES = "10.215.0.0/16"
API_ADDRESS = "10.215.0.1"
"""Of the API server, as pods find it: the first of the services."""
DNS_ADDRESS = "10.215.0.10"
HOST_ADDRESS = "10.213.0.254"
"""Of this machine, as nodes and pods see it: what tests start beside the cluster listens here."""


@dataclass(frozen=True)
class Node:
    """One node. The first one also runs the control plane, and its bridge joins the others and this machine."""

    number: int

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def namespace(self) -> str:
        """Its network namespace."""
        return f"finetune-{self.name}"

    @property
    def address(self) -> str:
        return f"10.213.0.{self.number}"

    @property
    def pods(self) -> str:
        """The first two bytes of its pods' addresses."""
        return f"10.{212 + self.number}"

    @property
    def cgroup(self) -> str:
        """The group of all its pods."""
        return f"/finetune-{self.name}"


NODES = (Node(1), Node(2))


@dataclass(frozen=True)
class Layout:
    """`root` holds what is large or looked at afterwards, `run` what lives as long as the cluster: sockets, mounts."""

    root: Path
    run: Path = Path("/run/finetune-cluster")

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def etcd(self) -> Path:
        return self.root / "etcd"

    @property
    def shared(self) -> Path:
        """A folder of this machine that pods of every node can mount, as they would a network file system."""
        return self.root / "shared"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.root / "kubeconfig"

    @property
    def settings(self) -> Path:
        """What the machine was like before."""
        return self.root / "before.json"

    def of(self, node: Node) -> Path:
        """What a node keeps: images, containers, the kubelet's folder."""
        return self.root / node.name

    def run_of(self, node: Node) -> Path:
        return self.run / node.name

    def socket_of(self, node: Node) -> Path:
        """containerd's."""
        return self.run_of(node) / "containerd.sock"


def layout() -> Layout:
    """Beside the cache, whose images nodes share: both must be on one file system."""
    given = os.environ.get("FINETUNE_CLUSTER_FOLDER")
    return Layout(Path(given) if given else cache_folder().parent / "cluster")
