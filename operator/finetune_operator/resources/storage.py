"""Which volumes a job's pods mount, and where in them the run keeps its files.

Head and workers are different pods. Where the runtime's `storage` is a claim that many nodes can mount at once, all of
them see what the driver prepares (tokenized data, unpacked models) and what rank 0 writes. Where it is a bucket they
share that alone: checkpoints and artifacts go there, and each pod prepares model and data on a disk of its own.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.problems import InvalidManifest
from finetune_api.runtime import FineTuneRuntimeSpec
from finetune_api.spec import Pods
from finetune_api.uris import Scheme, Uri, in_bucket, parse_uri
from finetune_operator import names
from finetune_operator.names import SCRATCH
from finetune_operator.resources.config_map import PLAN_KEY
from finetune_operator.resources.metadata import Document, Owner

__all__ = ["PLAN_FOLDER", "PVC_ROOT", "Mounts", "Places", "check_shared_files", "loss_of_model", "mounts", "places"]

PVC_ROOT = "/mnt/pvc"
"""Each claim is a folder below it."""
PLAN_FOLDER = "/etc/finetune"
_SHARED_MEMORY = "/dev/shm"
_TEMPORARY = "/tmp"
_TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
_TOKEN_SECONDS = 3600
_OURS = frozenset({PLAN_FOLDER, SCRATCH, _TOKEN_FOLDER})
_CLAIM = f"{Scheme.PVC.value}://"
_SHARED_CACHE = ".cache"
"""Below the runtime's storage, for all jobs on the claim: no namespace, which comes next there, starts with a dot."""


@dataclass(frozen=True)
class Places:
    """Where one attempt keeps its files, as the containers see them."""

    workdir: str
    cache: str


@dataclass
class Mounts:
    """Volumes of a pod, and where its container mounts them."""

    volumes: list[Document] = field(default_factory=list)
    volume_mounts: list[Document] = field(default_factory=list)

    def add(self, name: str, source: Document, path: str, read_only: bool = False) -> None:
        """Mount `source` at `path`, once: where something is mounted already it stays."""
        if any(mount["mountPath"] == path for mount in self.volume_mounts):
            return
        same = (volume["name"] for volume in self.volumes if _source(volume) == source)
        known = None if "emptyDir" in source else next(same, None)  # an empty one is another one each time
        if known is None:
            self.volumes.append({"name": name, **source})
        mount: Document = {"name": known or name, "mountPath": path}
        if read_only:
            mount["readOnly"] = True
        self.volume_mounts.append(mount)


def places(plan: RunPlan, runtime: FineTuneRuntimeSpec, attempt: int) -> Places:
    """The working folder of one attempt, and the cache that attempts and jobs share.

    Without storage that pods mount both are the pod's own.
    """
    storage, root = _folder(plan.storage), _folder(runtime.storage)
    return Places(
        workdir=posixpath.join(storage, f"attempt-{attempt}") if storage else posixpath.join(SCRATCH, "run"),
        cache=posixpath.join(root or storage or SCRATCH, _SHARED_CACHE),
    )


def check_shared_files(plan: RunPlan) -> None:
    """Whether the pods of the plan see what they must see of each other's files. Raises InvalidManifest.

    What is in a pod goes with it, checkpoints too; and where there are several workers one of them writes what all of
    them read.
    """
    if in_bucket(plan.storage):
        _check_without_shared_disk(plan)
    if plan.storage is not None:
        return
    remedy = (
        "name a runtime whose spec.storage every pod can mount, such as pvc://claim/path, or is a bucket, such as"
        " s3://bucket/prefix"
    )
    found = []
    if plan.checkpoint is not None:
        message = f"would be lost with the pods, because no runtime names a storage; {remedy}, or leave it out"
        found.append(Problem(path="spec.checkpoint", message=message))
    if plan.workers.replicas > 1:
        message = f"several workers share files, and no runtime names a storage; {remedy}, or ask for one worker"
        value = str(plan.workers.replicas)
        found.append(Problem(path="spec.cluster.workers.replicas", value=value, message=message))
    if found:
        raise InvalidManifest(found)


def _check_without_shared_disk(plan: RunPlan) -> None:
    """All but one thing is made by each pod for itself: answers of a teacher, which ranks write together."""
    distill = plan.method.distill
    if distill is None or distill.teacher_answers is None or plan.workers.replicas == 1:
        return
    message = (
        "are kept on a disk that all workers share, and the runtime's storage is a bucket; ask for one worker, or name"
        " a runtime whose spec.storage every pod can mount, such as pvc://claim/path"
    )
    raise InvalidManifest([Problem(path="spec.method.distill.teacherAnswers", message=message)])


def loss_of_model(plan: RunPlan) -> str | None:
    """A warning, where what is trained has no place that outlives the pods."""
    if plan.storage is not None or plan.outputs:
        return None
    return (
        "The trained model will be lost with its pods: the job has no spec.outputs, and no runtime names a storage."
        " Delete the job and give it one of them."
    )


def mounts(
    owner: Owner, plan: RunPlan, runtime: FineTuneRuntimeSpec, pods: list[Pods], attempt: int, shared_memory: str
) -> Mounts:
    """Everything that a pod of the attempt mounts. `pods` are additions, the most particular first.

    A person's own mount of a claim, /dev/shm or /tmp stands in the place of ours; plan, scratch and token do not move.
    """
    result = Mounts()
    plan_map = {"name": names.plan_config_map(owner.name, attempt), "items": [{"key": PLAN_KEY, "path": PLAN_KEY}]}
    result.add("plan", {"configMap": plan_map}, PLAN_FOLDER, read_only=True)
    result.add("scratch", {"emptyDir": {}}, SCRATCH)
    result.add("token", {"projected": {"sources": _token_sources()}}, _TOKEN_FOLDER, read_only=True)
    added = [volume for one in pods for volume in one.volumes]
    for number, volume in enumerate(added):
        path = posixpath.normpath(volume.mount_path)
        if path in _OURS:
            continue
        if volume.claim is not None:
            result.add(f"added-{number}", _claim(volume.claim), path, volume.read_only)
        elif volume.secret is not None:
            result.add(f"added-{number}", {"secret": {"secretName": volume.secret}}, path, read_only=True)
        else:
            result.add(f"added-{number}", {"configMap": {"name": volume.config_map}}, path, read_only=True)
    for number, claim in enumerate(_claims(plan, runtime)):
        result.add(f"claim-{number}", _claim(claim), posixpath.join(PVC_ROOT, claim))
    result.add("temporary", {"emptyDir": {}}, _TEMPORARY)
    result.add("shared-memory", {"emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}, _SHARED_MEMORY)
    return result


def _token_sources() -> list[Document]:
    """A token for the API server that is renewed each hour, and the authority to know the server by.

    Any worker may turn out to be rank 0, and the driver on the head reports what comes before and after training: so
    every pod has it, and it opens nothing but the job's progress.
    """
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": _TOKEN_SECONDS}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
    ]


def _claim(name: str) -> Document:
    return {"persistentVolumeClaim": {"claimName": name}}


def _source(volume: Document) -> Document:
    return {key: value for key, value in volume.items() if key != "name"}


def _folder(storage: str | None) -> str | None:
    """A URI of storage as a folder of the containers; None for places that are no folder."""
    uri = _uri(storage)
    if uri is None or uri.scheme not in (Scheme.PVC, Scheme.FILE):
        return None
    return uri.path if uri.scheme is Scheme.FILE else posixpath.join(PVC_ROOT, uri.authority, uri.path)


def _claims(plan: RunPlan, runtime: FineTuneRuntimeSpec) -> list[str]:
    """Every claim that the plan names, each once, in order. What planning wrote down for people names none."""
    document = plan.model_copy(update={"decisions": []}).to_document()
    texts = (text for text in [*_texts(document), runtime.storage or ""] if text.startswith(_CLAIM))
    return sorted({uri.authority for uri in map(_uri, texts) if uri is not None})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _uri(text: str | None) -> Uri | None:
    try:
        return parse_uri(text) if text else None
    except ValueError:
        return None
