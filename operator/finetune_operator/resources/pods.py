"""The pod of a Ray node: one container, hardened, with what job and runtime add to it.

The security context is that of Kubernetes' "restricted" level, so that jobs run in namespaces which enforce it, and the
image cannot be changed: what is written goes to /tmp, where Ray works, to $HOME, and to volumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.plan import Device, RunPlan
from finetune_api.runtime import FineTuneRuntimeSpec
from finetune_api.spec import EnvVar, Pods, Toleration
from finetune_operator import names
from finetune_operator.names import SCRATCH
from finetune_operator.resources.metadata import Document, Owner
from finetune_operator.resources.scheduling import Placement
from finetune_operator.resources.sizes import Size
from finetune_operator.resources.storage import PVC_ROOT, mounts, places

__all__ = ["DRAIN_SECONDS", "GRACE_SECONDS", "Software", "pod_template"]

DRAIN_SECONDS = 60
"""How long trainers may go on after they were asked to stop: to end the step and to write what is worth keeping."""
GRACE_SECONDS = DRAIN_SECONDS + 30
"""How long a pod has to end; above the drain, so that the kubelet does not cut it off."""
_USER = 1000
"""Of Ray's images and ours. runAsNonRoot alone refuses images that name their user and do not number it."""
_TOKEN_AUTH_SINCE = (2, 52, 0)


@dataclass(frozen=True)
class Software:
    """What runs in the container."""

    image: str
    ray_version: str
    token_auth: bool
    """Does the runtime ask for it?"""

    @property
    def knows_tokens(self) -> bool:
        """Can this Ray ask for a token at all?"""
        return tuple(int(part) for part in self.ray_version.split(".")) >= _TOKEN_AUTH_SINCE

    @property
    def asks_for_token(self) -> bool:
        """Will the job's Ray ask for a token?"""
        return self.token_auth and self.knows_tokens


def pod_template(
    owner: Owner,
    job: FineTuneJob,
    plan: RunPlan,
    runtime: FineTuneRuntimeSpec,
    attempt: int,
    role: str,
    size: Size,
    software: Software,
    placement: Placement,
) -> Document:
    """The template of the head (names.HEAD) or of a worker (names.WORKER)."""
    added = [job.spec.cluster.pods, runtime.pods]
    held = mounts(owner, plan, runtime, added, attempt, size.shared_memory)
    container = {
        "name": names.RAY_CONTAINER,
        "image": software.image,
        **_from_secret(runtime),
        "env": _environment(owner, plan, runtime, attempt, size, software, added),
        "resources": size.resources(),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": not any(one.writable_root for one in added),
        },
        "volumeMounts": held.volume_mounts,
    }
    spec: Document = {
        "serviceAccountName": names.trainer_account(owner.name),
        # Mounted by hand instead, into this container only: whatever is injected beside it gets no token.
        "automountServiceAccountToken": False,
        # A Service that happens to be called ray-something would fill the environment with RAY_* variables.
        "enableServiceLinks": False,
        # A container that came back would be an empty Ray node in a group whose training has failed already. The next
        # attempt starts all of them, together.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",  # a claim with a million files is not walked at each start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": held.volumes,
        **_additions(added),
        **placement.pod_fields(),
        **(placement.worker_fields(owner, attempt) if role == names.WORKER else {}),
    }
    metadata: Document = {"labels": _merged(one.labels for one in added) | names.pod_labels(owner.name, attempt, role)}
    annotations = _merged(one.annotations for one in added)
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": spec}


def _environment(
    owner: Owner,
    plan: RunPlan,
    runtime: FineTuneRuntimeSpec,
    attempt: int,
    size: Size,
    software: Software,
    added: list[Pods],
) -> list[Document]:
    """Ours that nobody may change, then our defaults, with what the runtime and the job put in their place."""
    where = places(plan, runtime, attempt)
    fixed = {
        "FINETUNE_JOB": owner.name,
        "FINETUNE_NAMESPACE": owner.namespace,
        "FINETUNE_ATTEMPT": str(attempt),
        "FINETUNE_PROGRESS_CONFIGMAP": names.progress_config_map(owner.name),
        "FINETUNE_PVC_ROOT": PVC_ROOT,
        "FINETUNE_WORKDIR": where.workdir,
        "FINETUNE_CACHE": where.cache,
        "FINETUNE_RAY_VERSION": software.ray_version,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own patience when its node is told to end, and when its job is told to stop (3 seconds otherwise).
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
        "RAY_JOB_STOP_WAIT_TIME_S": str(DRAIN_SECONDS),
    }
    if software.knows_tokens and not software.token_auth:
        # Left alone, the head's Ray makes a token for itself that the workers do not have.
        fixed["RAY_AUTH_MODE"] = "disabled"
    defaults = {
        "HOME": SCRATCH,  # the image's belongs to a user that these pods may not be
        "HF_HOME": f"{where.cache}/huggingface",  # what one attempt has fetched the next one finds
        "OMP_NUM_THREADS": str(size.threads),  # otherwise as many as the node has, for each process
    }
    if plan.workers.device is Device.CUDA:
        # A rank that loses another says so: those lines tell a lost network from a fault of the program.
        defaults["NCCL_DEBUG"] = "WARN"
    variables = {name: {"name": name, "value": value} for name, value in (fixed | defaults).items()}
    for one in reversed(added):
        variables |= {variable.name: _variable(variable) for variable in one.env if variable.name not in fixed}
    return list(variables.values())


def _from_secret(runtime: FineTuneRuntimeSpec) -> Document:
    """Variables that a Secret names itself. Those of `env` stand over them, ours among them."""
    if runtime.storage_secret is None:
        return {}
    return {"envFrom": [{"secretRef": {"name": runtime.storage_secret}}]}


def _variable(variable: EnvVar) -> Document:
    if variable.secret is not None:
        return {"name": variable.name, "valueFrom": {"secretKeyRef": variable.secret.to_document()}}
    if variable.config_map is not None:
        return {"name": variable.name, "valueFrom": {"configMapKeyRef": variable.config_map.to_document()}}
    return {"name": variable.name, "value": variable.value or ""}


def _additions(added: list[Pods]) -> Document:
    """Selectors, tolerations and pull secrets; what nobody asked for is left out."""
    secrets = _unique({"name": name} for one in reversed(added) for name in one.image_pull_secrets)
    fields: Document = {
        "nodeSelector": _merged(one.node_selector for one in added),
        "tolerations": _unique(_toleration(toleration) for one in reversed(added) for toleration in one.tolerations),
        "imagePullSecrets": secrets,
    }
    return {key: value for key, value in fields.items() if value}


def _toleration(toleration: Toleration) -> Document:
    return toleration.to_document()


def _merged(particular_first: Iterable[Mapping[str, str]]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for one in particular_first:
        merged = {**one, **merged}
    return merged


def _unique(items: Iterable[Document]) -> list[Document]:
    kept: list[Any] = []
    for item in items:
        if item not in kept:
            kept.append(item)
    return kept
