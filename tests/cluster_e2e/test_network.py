"""NetworkPolicies under a real enforcer (kube-network-policies): jobs train, and strangers do not reach their Ray."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.build import program_path
from tests.cluster.images import TRAINER
from tests.cluster.nodes.cluster import Cluster
from tests.cluster.nodes.control import SERVER_PORT
from tests.cluster.nodes.layout import NETWORK, NODES, Node
from tests.cluster.processes import wait_until
from tests.cluster_e2e.conftest import Say, Submit
from tests.cluster_e2e.world import CHART, NAMESPACE, World

pytestmark = pytest.mark.cluster

ENFORCER = "kube-network-policies"
RAY_PORTS = (6379, 8265, 10001)
"""Of the head: its store, its dashboard with the Jobs API, Ray Client."""
METRICS = 8080
"""Of the operator."""
PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
TRY = """
import socket, sys
def reached(port):
    try:
        socket.create_connection((sys.argv[1], port), timeout=3).close()
    except OSError:
        return False
    return True
print([port for port in map(int, sys.argv[2:]) if reached(port)])
"""


def daemon(program: Path) -> list[dict[str, Any]]:
    """The enforcer on every node, with the rights that its own manifest gives it. Told to end, it takes its rules back,
    which it does for SIGINT alone."""
    metadata: dict[str, Any] = {"name": ENFORCER}
    placed = {**metadata, "namespace": ENFORCER}
    rights = [
        {"apiGroups": [""], "resources": ["pods", "namespaces", "nodes"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": ["networking.k8s.io"],
            "resources": ["networkpolicies"],
            "verbs": ["get", "list", "watch"],
        },
    ]
    subject = {"kind": "ServiceAccount", "name": ENFORCER, "namespace": ENFORCER}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": ENFORCER}
    script = f'trap "kill -INT \\$!" TERM; /tools/{program.name} --hostname-override="$NODE" --disable-nri & wait; wait'
    container = {
        "name": ENFORCER,
        "image": TRAINER,
        "command": ["bash", "-c", script],
        "env": [
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            # A node has no way to the addresses of Services.
            {"name": "KUBERNETES_SERVICE_HOST", "value": NODES[0].address},
            {"name": "KUBERNETES_SERVICE_PORT", "value": str(SERVER_PORT)},
        ],
        "readinessProbe": {"httpGet": {"path": "/metrics", "port": 9080}, "periodSeconds": 1},
        "securityContext": {"privileged": True, "runAsUser": 0},
        "volumeMounts": [{"name": "tools", "mountPath": "/tools", "readOnly": True}],
    }
    pod = {
        "hostNetwork": True,
        "serviceAccountName": ENFORCER,
        "containers": [container],
        "volumes": [{"name": "tools", "hostPath": {"path": str(program.parent)}}],
    }
    labels = {"app": ENFORCER}
    template = {"metadata": {"labels": labels}, "spec": pod}
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {**metadata, "labels": {"pod-security.kubernetes.io/enforce": "privileged"}},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": placed},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": metadata,
            "rules": rights,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": metadata,
            "subjects": [subject],
            "roleRef": role,
        },
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": placed,
            "spec": {"selector": {"matchLabels": labels}, "template": template},
        },
    ]


def queue_connections(node: Node, action: str) -> None:
    """Adds (-A) or deletes (-D) the rules that show the enforcer every connection that a pod begins. It has one of its
    own, by an expression of nftables (NFT_QUEUE) that not every kernel has."""
    for one in NODES:  # kubelets ask pods how they are; the first addresses of a node's network are its own
        _rule(node, action, "--source", f"{one.pods}.0.0/24", "--jump", "RETURN")
    begins = ("--destination", NETWORK, "--match", "conntrack", "--ctstate", "NEW")
    _rule(node, action, *begins, "--jump", "NFQUEUE", "--queue-num", "100", "--queue-bypass")


def _rule(node: Node, action: str, *rule: str) -> None:
    entered = ("nsenter", f"--net=/run/netns/{node.namespace}", "iptables", "--table", "mangle")
    subprocess.run([*entered, action, "POSTROUTING", *rule], check=True)


@pytest.fixture(scope="module")
def enforced(product: Cluster, say: Say) -> Iterator[None]:
    """Policies hold on both nodes."""
    documents = daemon(program_path(ENFORCER, say))
    product.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, documents)))
    try:
        product.kubectl("--namespace", ENFORCER, "rollout", "status", f"daemonset/{ENFORCER}", "--timeout=110s")
        for node in NODES:
            queue_connections(node, "-A")
        yield
        for node in NODES:
            queue_connections(node, "-D")
    finally:
        kinds = ("daemonset", "clusterrole", "clusterrolebinding", "namespace")
        for kind in kinds:
            product.kubectl("--namespace", ENFORCER, "delete", kind, ENFORCER, "--wait=true", "--timeout=100s")


@pytest.fixture
def stranger(team: World) -> Iterator[str]:
    """A pod in the team's own namespace that is no job's."""
    safe = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    who = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    container = {"name": "ray", "image": TRAINER, "command": ["sleep", "3600"], "securityContext": safe}
    spec = {"containers": [container], "securityContext": who, "terminationGracePeriodSeconds": 0}
    team.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "stranger"}, "spec": spec})
    team.kubectl("wait", "pod/stranger", "--for=condition=Ready", "--timeout=100s")
    yield "stranger"
    team.kubectl("delete", "pod", "stranger", "--wait=true")


def reached(team: World, pod: str, address: str, ports: tuple[int, ...] = RAY_PORTS) -> list[int]:
    """Ports at an address that take a connection from a pod."""
    told = team.kubectl("exec", pod, "--container=ray", "--", "python3.11", "-c", TRY, address, *map(str, ports))
    found: list[int] = json.loads(told)
    return found


def test_a_job_trains_and_only_its_own_pods_reach_its_ray(
    team: World, tiny: dict[str, Any], submit: Submit, enforced: None, stranger: str, product: Cluster
) -> None:
    """The operator is behind the chart's policy here, and KubeRay comes to the head's dashboard."""
    assert product.kubectl("--namespace", NAMESPACE, "get", "networkpolicies", "--output=name")
    training = {**tiny["training"], "maxSteps": 1500}
    spread = {"scheduling": {"topology": {"mode": "spread", "key": "kubernetes.io/hostname", "required": True}}}
    workers = {"cluster": {"workers": {"replicas": 2}}, "deepspeed": {"zeroStage": 2}, **spread}
    job = submit("guarded", {**tiny, **workers, "training": training, "checkpoint": {"everySteps": 100}})
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    (head,) = team.pods(job, "head")
    for worker in team.pods(job, "worker"):
        assert reached(team, worker["metadata"]["name"], head["status"]["podIP"]) == list(RAY_PORTS)
        assert reached(team, stranger, worker["status"]["podIP"]) == []
    assert reached(team, stranger, head["status"]["podIP"]) == []
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)


def test_where_only_prometheus_may_ask_for_metrics_helms_own_test_still_passes(
    team: World, enforced: None, stranger: str, product: Cluster
) -> None:
    selector = "--selector=app.kubernetes.io/component=operator"
    listed = json.loads(product.kubectl("--namespace", NAMESPACE, "get", "pods", selector, "--output=json"))
    address = listed["items"][0]["status"]["podIP"]
    assert reached(team, stranger, address, (METRICS,)) == [METRICS]
    upgrade = ("upgrade", "finetune-operator", CHART, "--namespace", NAMESPACE, "--reuse-values", "--set-json")
    product.helm(*upgrade, f"networkPolicy.metricsFrom={json.dumps([PROMETHEUS])}")
    try:
        wait_until(lambda: reached(team, stranger, address, (METRICS,)) == [], "the policy to hold")
        assert "Succeeded" in product.helm("test", "finetune-operator", "--namespace", NAMESPACE)
    finally:
        product.helm(*upgrade, "networkPolicy.metricsFrom=[]")
