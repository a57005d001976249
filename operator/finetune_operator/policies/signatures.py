"""The tables that `classification` reads: what pods, messages and KubeRay say when something has gone wrong.

A row is data: what to look for, which class of failure it is, and whose words they are. Of two rows that match, the
upper one counts. A new signature is a new row here and an example beside it in the test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.failures import FailureClass
from finetune_operator.states import PodState

__all__ = ["KUBERAY_REASONS", "PLATFORM", "POD_SIGNS", "TEXT_SIGNS", "PodSign", "TextSign"]

PLATFORM = frozenset({FailureClass.PREEMPTED, FailureClass.NODE_LOST})
"""Classes in which something outside the job ended it."""


@dataclass(frozen=True)
class PodSign:
    """What a pod looks like."""

    says: str
    """What happened, as the end of the sentence "Pod x ..."."""
    failure_class: FailureClass
    holds: Callable[[PodState], bool]


@dataclass(frozen=True)
class TextSign:
    """What a message or the end of a log holds, upper and lower case alike."""

    says: str
    """What happened, and whose words tell it."""
    failure_class: FailureClass
    pattern: re.Pattern[str]


def _disrupted(reason: str) -> Callable[[PodState], bool]:
    return lambda pod: pod.disruption == reason


def _evicted(*words: str) -> Callable[[PodState], bool]:
    return lambda pod: pod.reason == "Evicted" and any(word in pod.message.lower() for word in words)


def _reason(*reasons: str) -> Callable[[PodState], bool]:
    return lambda pod: pod.reason in reasons


# Conditions of type DisruptionTarget: kubernetes.io/docs/concepts/workloads/pods/disruptions. Words of an eviction:
# pkg/kubelet/eviction/helpers.go in Kubernetes 1.34; of a node's shutdown: pkg/kubelet/nodeshutdown there.
POD_SIGNS: tuple[PodSign, ...] = (
    PodSign(
        "was killed because it used more memory than it may",
        FailureClass.OUT_OF_MEMORY,
        lambda pod: pod.terminated_reason == "OOMKilled",
    ),
    PodSign(
        "was evicted because a volume in memory grew beyond its limit",
        FailureClass.OUT_OF_MEMORY,
        _evicted('emptydir volume "shared-memory"'),
    ),
    PodSign(
        "was evicted because it filled the node's disk",
        FailureClass.STORAGE_ERROR,
        _evicted("ephemeral storage", "ephemeral-storage", "emptydir volume"),
    ),
    PodSign(
        "gave way to a pod of higher priority",
        FailureClass.PREEMPTED,
        _disrupted("PreemptionByScheduler"),
    ),
    PodSign(
        "was evicted so that its node could be emptied",
        FailureClass.PREEMPTED,
        _disrupted("EvictionByEvictionAPI"),
    ),
    PodSign(
        "was taken off a node that is unreachable, not ready or tainted",
        FailureClass.NODE_LOST,
        _disrupted("DeletionByTaintManager"),
    ),
    PodSign(
        "was removed because its node is gone",
        FailureClass.NODE_LOST,
        _disrupted("DeletionByPodGC"),
    ),
    PodSign(
        "was ended because its node shuts down",
        FailureClass.PREEMPTED,
        _reason("Terminated", "NodeShutdown", "Shutdown"),
    ),
    PodSign(
        "gave way to a pod that its node cannot do without",
        FailureClass.PREEMPTED,
        _reason("Preempting"),
    ),
    PodSign(
        "was evicted because its node ran short of something",
        FailureClass.PREEMPTED,
        _reason("Evicted"),
    ),
    PodSign(
        "was ended by its node",
        FailureClass.PREEMPTED,
        _disrupted("TerminationByKubelet"),
    ),
    PodSign(
        "is on a node that no longer answers",
        FailureClass.NODE_LOST,
        lambda pod: pod.reason == "NodeLost" or pod.phase == "Unknown",
    ),
    PodSign(
        "was lost from sight: its node came back without it",
        FailureClass.NODE_LOST,
        lambda pod: pod.terminated_reason == "ContainerStatusUnknown",
    ),
    PodSign(
        "was turned away by its node",
        FailureClass.NODE_LOST,
        lambda pod: pod.reason in ("UnexpectedAdmissionError", "NodeAffinity") or pod.reason.startswith("OutOf"),
    ),
)


def _text(says: str, failure_class: FailureClass, *alternatives: str) -> TextSign:
    return TextSign(says, failure_class, re.compile("|".join(alternatives), re.IGNORECASE))


TEXT_SIGNS: tuple[TextSign, ...] = (
    _text(
        "a GPU ran out of memory (PyTorch, cuBLAS)",
        FailureClass.OUT_OF_MEMORY,
        "CUDA out of memory",
        r"torch\.(cuda\.)?OutOfMemoryError",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ),
    _text(
        "the machine ran out of memory (Ray's memory monitor, the allocator)",
        FailureClass.OUT_OF_MEMORY,
        "due to the node running low on memory",
        r"ray\.exceptions\.OutOfMemoryError",
        r"can't allocate memory",
        "cannot allocate memory",
        r"std::bad_alloc",
    ),
    _text(
        "the loss overflowed until its scale could not be lowered any more (DeepSpeed)",
        FailureClass.NON_FINITE_LOSS,
        "Current loss scale already at minimum",
    ),
    _text(
        "a node was taken away (Ray, Ray Train)",
        FailureClass.PREEMPTED,
        r"Actor died by preemption",
        "due to node preemption",
        r"\bPreemptionError\b",
        "AUTOSCALER_DRAIN_PREEMPTED",
    ),
    _text(
        "a disk is full, gone or read-only (the kernel)",
        FailureClass.STORAGE_ERROR,
        "No space left on device",
        "Disk quota exceeded",
        "Stale file handle",
        "Read-only file system",
        "Input/output error",
    ),
    _text(
        "the object store refuses the credentials or knows no such bucket (S3)",
        FailureClass.USER_ERROR,
        r"\b403 Forbidden\b",
        r"\bAccessDenied\b",
        r"\bInvalidAccessKeyId\b",
        r"\bSignatureDoesNotMatch\b",
        r"\bNoSuchBucket\b",
    ),
    _text(
        "the object store is overloaded or out of reach (S3)",
        FailureClass.STORAGE_ERROR,
        r"\b503 (Service Unavailable|Slow Down)\b",
        r"\bSlowDown\b",
        r"\bServiceUnavailable\b",
        r"\b500 Internal Server Error\b",
    ),
    _text(
        "the hub does not let this job have the model or data (Hugging Face)",
        FailureClass.USER_ERROR,
        r"\bGatedRepoError\b",
        r"\bRepositoryNotFoundError\b",
        r"\bRevisionNotFoundError\b",
    ),
    _text(
        "the image lacks the trainers, or Python",
        FailureClass.USER_ERROR,
        "No module named '?finetune_trainers",
        r"python\d?: (command )?not found",
    ),
    _text(
        "Ray could not set up the entrypoint's environment",
        FailureClass.USER_ERROR,
        "runtime_env setup failed",
    ),
    _text(
        "the image's compiler or CUDA does not fit (DeepSpeed's builder)",
        FailureClass.USER_ERROR,
        r"CUDAMismatchException",
        r"Unable to JIT load the \S+ op",
    ),
    _text(
        "a GPU is broken (CUDA, the driver)",
        FailureClass.NODE_LOST,
        "uncorrectable ECC error",
        "GPU has fallen off the bus",
        "no CUDA-capable device is detected",
        "CUDA error: hardware stack error",
    ),
    _text(
        "ranks waited for each other until their patience ended (PyTorch's NCCL watchdog)",
        FailureClass.HANG,
        "Watchdog caught collective operation timeout",
    ),
    _text(
        "the network between workers, or one of them, went away (NCCL)",
        FailureClass.NODE_LOST,
        "unhandled system error",
        r"ncclSystemError",
        r"ncclRemoteError",
        "remote process exited or there was a network error",
        "NCCL communicator was aborted",
    ),
    _text(
        "the network between workers, or one of them, went away (gloo)",
        FailureClass.NODE_LOST,
        "Gloo connectFullMesh failed",
        r"gloo.*Connection (closed|reset) by peer",
    ),
    _text(
        "a node or its Ray daemon died (Ray)",
        FailureClass.NODE_LOST,
        r"\bNodeDiedError\b",
        r"\bLocalRayletDiedError\b",
        "local raylet died",
        "node it was running on is dead or unavailable",
        "Job supervisor actor died",
        "Failed to connect to GCS",
    ),
    _text(
        "Ray found no room for the entrypoint in time",
        FailureClass.START_TIMEOUT,
        "supervisor actor could not be scheduled",
        "Job supervisor actor failed to start within",
    ),
)

KUBERAY_REASONS: dict[str, tuple[FailureClass, str]] = {
    "ValidationFailed": (FailureClass.USER_ERROR, "KubeRay refused the RayJob"),
    "SubmissionFailed": (FailureClass.START_TIMEOUT, "KubeRay could not hand the entrypoint over"),
    "PreRunningDeadlineExceeded": (FailureClass.START_TIMEOUT, "the RayJob did not start in time"),
    "DeadlineExceeded": (FailureClass.DEADLINE_EXCEEDED, "the RayJob took longer than it may"),
    "JobStatusCheckTimeoutExceeded": (FailureClass.NODE_LOST, "the head did not answer KubeRay for too long"),
    "JobDeploymentStatusTransitionGracePeriodExceeded": (FailureClass.UNKNOWN, "KubeRay lost track of the job's end"),
}
"""status.reason of a RayJob, KubeRay 1.6 and 1.7. AppFailed says no more than that the entrypoint failed."""
