"""Who may reach a job's pods. Whoever reaches Ray's ports without a token runs code there, so almost nobody may."""

from __future__ import annotations

from finetune_operator import names
from finetune_operator.kinds import NETWORK_POLICY
from finetune_operator.resources.metadata import Document, Owner, child

__all__ = ["DASHBOARD_PORT", "network_policy"]

DASHBOARD_PORT = 8265
_KUBERAY = {"app.kubernetes.io/component": "kuberay-operator"}
"""On KubeRay's operator, whether its chart or its kustomization installed it. Its namespace is anybody's choice."""


def network_policy(owner: Owner) -> Document:
    """Lets in the pods of the same job, on every port, and KubeRay's operator to the head's dashboard, which it
    submits to and asks for the job's status.

    Everything outgoing is allowed: names must be resolved and models and data fetched. Policies add up, so a platform
    that scrapes Ray's metrics allows that by one of its own. Where KubeRay reaches dashboards through the API server
    (useKubernetesProxy) the request comes from an address that no selector names: turn `networkPolicy` off there.
    """
    pods = {"matchLabels": names.job_selector(owner.name)}
    kuberay = {"namespaceSelector": {}, "podSelector": {"matchLabels": _KUBERAY}}
    spec = {
        "podSelector": pods,
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": pods}]},
            {"from": [kuberay], "ports": [{"protocol": "TCP", "port": DASHBOARD_PORT}]},
        ],
    }
    return child(NETWORK_POLICY, owner, names.network_policy(owner.name), {"spec": spec})
