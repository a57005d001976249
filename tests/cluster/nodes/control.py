"""The control plane of the cluster, as processes in the first node's namespace: etcd and Kubernetes' own programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.cluster.nodes import daemons
from tests.cluster.nodes.layout import API_ADDRESS, SERVICES, Layout, Node

__all__ = [
    "CONTROL_PLANE",
    "SERVER_NAMES",
    "SERVER_PORT",
    "etcd_command",
    "manager_command",
    "server_command",
    "start_control_plane",
]

SERVER_PORT = 6443
CONTROL_PLANE = ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")
"""In the order in which they are stopped."""
SERVER_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    API_ADDRESS,
)
"""What the API server is called, beside its address."""
_LOST_SECONDS = 20
"""A node that is silent for so long counts as lost, and so much later its pods are given up: Kubernetes' own 50 and 300
seconds would only make tests wait."""


def start_control_plane(layout: Layout, node: Node, programs: Mapping[str, Path]) -> None:
    """Starts all of it; returns before it answers."""
    daemons.start(layout, "etcd", etcd_command(layout, node, programs["etcd"]), node)
    daemons.start(layout, "kube-apiserver", server_command(layout, node, programs["kube-apiserver"]), node, GOGC="200")
    manager = programs["kube-controller-manager"]
    daemons.start(layout, "kube-controller-manager", manager_command(layout, manager), node)
    scheduler = [programs["kube-scheduler"], *_as(layout, "kube-scheduler")]
    daemons.start(layout, "kube-scheduler", scheduler, node)


def etcd_command(layout: Layout, node: Node, program: Path) -> list[object]:
    clients, peers = f"https://{node.address}:2379", f"http://{node.address}:2380"
    return [
        program,
        f"--data-dir={layout.etcd}",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        # Pods could reach it: only who has a certificate is let in.
        f"--cert-file={layout.pki / 'etcd.crt'}",
        f"--key-file={layout.pki / 'etcd.key'}",
        f"--trusted-ca-file={layout.pki / 'ca.crt'}",
        "--client-cert-auth",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def server_command(layout: Layout, node: Node, program: Path) -> list[object]:
    pki, kubelet, etcd = layout.pki, layout.pki / "kubelet-client", layout.pki / "etcd"
    return [
        program,
        f"--etcd-servers=https://{node.address}:2379",
        f"--etcd-cafile={pki / 'ca.crt'}",
        f"--etcd-certfile={etcd}.crt",
        f"--etcd-keyfile={etcd}.key",
        f"--bind-address={node.address}",
        f"--advertise-address={node.address}",
        f"--secure-port={SERVER_PORT}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki / 'accounts.pub'}",
        f"--service-account-signing-key-file={pki / 'accounts.key'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--service-cluster-ip-range={SERVICES}",
        "--allow-privileged=true",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        f"--kubelet-client-certificate={kubelet}.crt",
        f"--kubelet-client-key={kubelet}.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--default-not-ready-toleration-seconds={_LOST_SECONDS}",
        f"--default-unreachable-toleration-seconds={_LOST_SECONDS}",
    ]


def manager_command(layout: Layout, program: Path) -> list[object]:
    pki = layout.pki
    return [
        program,
        *_as(layout, "kube-controller-manager"),
        f"--service-account-private-key-file={pki / 'accounts.key'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        "--use-service-account-credentials=true",
        f"--node-monitor-grace-period={_LOST_SECONDS}s",
    ]


def _as(layout: Layout, name: str) -> list[str]:
    """Who it is to the API server; nobody asks it anything, and there is no other to elect."""
    return [f"--kubeconfig={layout.run / f'{name}.kubeconfig'}", "--leader-elect=false", "--secure-port=0"]
