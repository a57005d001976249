"""The kinds of object that the operator reads or writes, and where the API server has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from finetune_api.base import API_VERSION

__all__ = [
    "CONFIG_MAP",
    "EVENT",
    "FINETUNE_JOB",
    "FINETUNE_RUNTIME",
    "LEASE",
    "NETWORK_POLICY",
    "POD",
    "POD_DISRUPTION_BUDGET",
    "RAY_JOB",
    "ROLE",
    "ROLE_BINDING",
    "SERVICE_ACCOUNT",
    "Key",
    "Kind",
]


class Key(NamedTuple):
    """Which object of a kind; `namespace` is empty for one that belongs to the cluster."""

    namespace: str
    name: str


@dataclass(frozen=True)
class Kind:
    """A kind of object."""

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        """The URL path of one object, of all in a namespace, or of all in the cluster."""
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        inside = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return f"{root}{inside}/{self.plural}" + (f"/{name}" if name else "")


FINETUNE_JOB = Kind(API_VERSION, "FineTuneJob", "finetunejobs")
FINETUNE_RUNTIME = Kind(API_VERSION, "FineTuneRuntime", "finetuneruntimes", namespaced=False)
RAY_JOB = Kind("ray.io/v1", "RayJob", "rayjobs")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
POD = Kind("v1", "Pod", "pods")
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
EVENT = Kind("v1", "Event", "events")
ROLE = Kind("rbac.authorization.k8s.io/v1", "Role", "roles")
ROLE_BINDING = Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
POD_DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
