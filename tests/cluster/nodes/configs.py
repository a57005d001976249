"""The configuration of everything that runs on a node, as values and text. Called by the modules that start it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cluster.images import COREDNS, SANDBOX
from tests.cluster.nodes.layout import DNS_ADDRESS, NETWORK, Layout, Node

__all__ = [
    "BRIDGE",
    "cni_config",
    "containerd_config",
    "coredns_objects",
    "kubeconfig",
    "kubelet_config",
    "proxy_config",
]

BRIDGE = "cni0"
"""In the namespace of each node."""
_CNI_PROGRAMS = "/usr/lib/cni"
_COREFILE = """.:53 {
    errors
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        ttl 5
    }
    cache 5
    reload
}
"""
_DNS_LABELS = {"k8s-app": "kube-dns"}


def containerd_config(layout: Layout, node: Node) -> str:
    """For containerd 1.6, Debian's.

    On a machine that may not lower anybody's oom_score_adj (no CAP_SYS_RESOURCE) no pod would start without
    restrict_oom_score_adj. Network namespaces of pods lie below our folder, so that none is left behind.
    """
    root, run = layout.of(node), layout.run_of(node)
    return f"""version = 2
root = "{root / "containerd"}"
state = "{run / "containerd"}"
oom_score = 0
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "{layout.socket_of(node)}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{SANDBOX}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_tcp_service = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_CNI_PROGRAMS}"
    conf_dir = "{run / "cni"}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""


def cni_config(layout: Layout, node: Node) -> str:
    """Pods on a bridge, whose address is the node's own on the first node."""
    addresses = {
        "subnet": f"{node.pods}.0.0/16",
        "rangeStart": f"{node.pods}.1.1",
        "rangeEnd": f"{node.pods}.200.254",
        "gateway": f"{node.pods}.0.1",
    }
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(layout.run_of(node) / "addresses"),
            "ranges": [[addresses]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    return json.dumps({"cniVersion": "0.4.0", "name": f"finetune-{node.name}", "plugins": [bridge]}, indent=2)


def kubelet_config(layout: Layout, node: Node) -> dict[str, Any]:
    """A kubelet that is content with control groups of the first version, swap, and a nearly full disk."""
    socket = f"unix://{layout.socket_of(node)}"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": node.address,
        "healthzPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(layout.pki / f"{node.name}.crt"),
        "tlsPrivateKeyFile": str(layout.pki / f"{node.name}.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": node.cgroup,
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(layout.run / "resolv.conf"),
        "containerRuntimeEndpoint": socket,
        "imageServiceEndpoint": socket,
        "maxPods": 60,
        "evictionHard": {"memory.available": "300Mi", "nodefs.available": "2%", "imagefs.available": "2%"},
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "5s",
        "podLogsDir": str(layout.of(node) / "pod-logs"),
    }


def proxy_config(layout: Layout, node: Node) -> dict[str, Any]:
    """kube-proxy by iptables, in the node's namespace; it leaves the machine's connection tracking alone."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "hostnameOverride": node.name,
        "clusterCIDR": NETWORK,
        "oomScoreAdj": 0,
        "metricsBindAddress": f"{node.address}:10249",
        "healthzBindAddress": f"{node.address}:10256",
        "clientConnection": {"kubeconfig": str(layout.run / "kube-proxy.kubeconfig")},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def kubeconfig(server: str, ca_file: Path, certificate: Path) -> dict[str, Any]:
    """How who has this certificate, and the key beside it, reaches the API server."""
    user = {"client-certificate": str(certificate), "client-key": str(certificate.with_suffix(".key"))}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "finetune", "cluster": {"server": server, "certificate-authority": str(ca_file)}}],
        "users": [{"name": "finetune", "user": user}],
        "contexts": [{"name": "finetune", "context": {"cluster": "finetune", "user": "finetune"}}],
        "current-context": "finetune",
    }


def coredns_objects() -> list[dict[str, Any]]:
    """The cluster's DNS, which knows the cluster's names and no others."""
    metadata = {"name": "coredns", "namespace": "kube-system"}
    rbac = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    container = {
        "name": "coredns",
        "image": COREDNS,
        "args": ["/manager", "-conf", "/etc/coredns/Corefile"],
        "securityContext": {"runAsUser": 0},  # a port below 1024
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "20m", "memory": "32Mi"}},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
    }
    pod = {
        "serviceAccountName": "coredns",
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        "nodeSelector": {"kubernetes.io/hostname": "node-1"},  # a lost node is a test's own
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
    }
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": {"name": "system:coredns"}, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"kind": "ServiceAccount", **metadata}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"Corefile": _COREFILE}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "selector": {"matchLabels": _DNS_LABELS},
                "template": {"metadata": {"labels": _DNS_LABELS}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {
                "clusterIP": DNS_ADDRESS,
                "selector": _DNS_LABELS,
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                ],
            },
        },
    ]
