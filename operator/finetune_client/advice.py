"""Why a job is where it is, in a sentence, and the next thing to do about it.

Pure; used by the handles of `client` and by `finetune get`, `list` and `describe`. The reasons are the operator's own
(conditions), so what is said here only adds whom to turn to and what to type.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.failures import FailureClass
from finetune_api.job import Phase
from finetune_api.spec.lifecycle import MANAGER
from finetune_client.commands import about
from finetune_client.views import JobView
from finetune_operator.conditions import why
from finetune_operator.kinds import Key
from finetune_operator.raw import text

__all__ = ["Advice", "advice_for", "typed"]

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")

_MENDED = (
    *("Forbidden", "KubeRayMissing", "KubeRaySilent", "NameTaken", "NamespaceTerminating", "PodsNotCreated"),
    "Refused",
)
"""Reasons of condition ClusterReady whose message says what is to be done."""

_QUEUED = (
    "kubectl get workloads shows the queue; Kueue makes no workload of a job whose scheduling.priorityClass is no "
    "WorkloadPriorityClass"
)

_AFTER_FAILURE = {
    FailureClass.USER_ERROR: "Correct the manifest, then: {cancel}, and {submit}",
    FailureClass.DATA_ERROR: "Correct the data (finetune validate FILE --data checks every row), then: {cancel}, and "
    "{submit}",
    FailureClass.NON_FINITE_LOSS: "Try a smaller training.learningRate, or training.precision fp32, under a new name",
    FailureClass.KL_DIVERGED: "Try a smaller training.learningRate or a higher KL coefficient, under a new name",
    FailureClass.OUT_OF_MEMORY: "Try a smaller training.microBatchSize or method maxSeqLength, or a higher "
    "deepspeed.zeroStage, under a new name",
    FailureClass.STORAGE_ERROR: "See to it that the storage is there, writable and not full, then submit the job again",
    FailureClass.PREEMPTED: "Raise failurePolicy.maxPreemptions, or use a queue that is preempted less",
    FailureClass.NODE_LOST: "Submit the job again; with spec.checkpoint it would lose only the last steps",
    FailureClass.START_TIMEOUT: "Look at what its pods waited for: {describe}; image, secrets, volumes and GPUs of the "
    "runtime are the usual causes",
    FailureClass.HANG: "Look at the end of the log: {logs}; failurePolicy.hangTimeoutSeconds says how long is too long",
    FailureClass.DEADLINE_EXCEEDED: "Raise lifecycle.activeDeadlineSeconds, or ask for fewer steps, under a new name",
    FailureClass.DEPENDENCY_FAILED: "Mend the job that it names, then submit both again",
    FailureClass.UNKNOWN: "Look at the end of the log: {logs}; what is known is in {describe}",
}


@dataclass(frozen=True)
class Advice:
    """`why` is empty where there is nothing to explain, `next` where there is nothing to do."""

    why: str = ""
    next: str = ""


def advice_for(view: JobView) -> Advice:
    """What to tell the person whose job this is."""
    if view.is_over:
        return _of_the_end(view)
    if view.status.observed_generation is None:
        return _of_silence(view)
    if (refused := view.condition("Valid")) is not None and refused.status == "False":
        return Advice(_sentence(refused.message), _after_refusal(view, refused.reason))
    if view.phase is Phase.SUSPENDED or (view.wants_suspension and not view.status.attempts):
        suspended = view.condition("Suspended")
        return Advice(_sentence(suspended.message) if suspended else "", typed("resume", view))
    told = why(view.phase, view.status.conditions)
    lost = told.message if told is not None and told.type == "StatusKept" else ""
    if view.phase is Phase.RUNNING:
        return Advice(_sentence(lost), "" if view.wants_suspension else typed("logs", view, "-f"))
    return Advice(_sentence(lost)) if lost else _of_waiting(view)


def _of_the_end(view: JobView) -> Advice:
    if view.phase is Phase.SUCCEEDED:
        places = view.artifacts
        return Advice(next=f"The model is {places[0].uri}" if places else "")
    failed = view.condition("Failed")
    kind = view.status.failure
    commands = {name: typed(name, view) for name in ("cancel", "describe", "logs")} | {"submit": _submit(view)}
    return Advice(
        _sentence(failed.message) if failed else "", _AFTER_FAILURE[kind].format(**commands) if kind is not None else ""
    )


def _of_silence(view: JobView) -> Advice:
    manager = text(view.document, "spec", "managedBy")
    if manager and manager != MANAGER:
        return Advice(f"spec.managedBy leaves the job to {manager}.", "Remove spec.managedBy to have it run here")
    return Advice(
        "No operator has looked at the job yet.",
        "If that lasts, see whether one runs and looks after this namespace: "
        "kubectl get pods -A -l app.kubernetes.io/name=finetune-operator",
    )


def _after_refusal(view: JobView, reason: str) -> str:
    if reason == "RuntimeNotFound":
        return "Choose one of: kubectl get finetuneruntimes; the job starts by itself once its runtime is there"
    if reason == "RuntimeInvalid":
        return "Have the platform's team correct the runtime; the job then starts by itself"
    if reason == "DependencyUnfit":
        return (
            "Correct the job that it names, and this one then starts by itself; or correct this one's manifest, then: "
            f"{typed('cancel', view)}, and {_submit(view)}"
        )
    return f"Correct the manifest, then: {typed('cancel', view)}, and {_submit(view)}"


def _of_waiting(view: JobView) -> Advice:
    """A job that is admitted and has no cluster, or is not admitted, or waits before another attempt."""
    cluster, admitted = view.condition("ClusterReady"), view.condition("Admitted")
    if admitted is not None and admitted.status == "False" and admitted.reason == "DependencyPending":
        return Advice(_sentence(admitted.message), "It starts by itself when that job has written its model")
    if cluster is not None and cluster.status == "False" and cluster.reason not in ("Queued", "NotStarted"):
        return Advice(_sentence(cluster.message), _for_the_cluster(view, cluster.reason, cluster.message))
    if admitted is not None and admitted.status == "False":
        return Advice(_sentence(admitted.message), _QUEUED if admitted.reason == "Queued" else "")
    running = view.condition("Running")
    return Advice(_sentence(running.message) if running is not None and running.status == "False" else "")


def _for_the_cluster(view: JobView, reason: str, message: str) -> str:
    if reason in ("BackingOff", "Deleting", "Starting", "Suspended"):
        return ""
    if reason in _IMAGE:
        return "Correct the image (spec.cluster.image, or the runtime's) or its pull secret: kubectl get events"
    if reason in _CONFIG:
        return "Create what the pod names, a secret or a config map, in the job's namespace; it then starts by itself"
    if reason == "VolumesNotMounted":
        return "Create what is missing in the job's namespace, or name another; it then starts by itself"
    if reason in _MENDED:
        return "It starts by itself once that is mended"
    if "persistentvolumeclaim" in message:
        return "Create the claim in the job's namespace (kubectl get pvc), or name another; it then starts by itself"
    if "Insufficient" in message or "node(s)" in message:
        return "Ask for fewer or other workers (spec.cluster.workers), or wait until machines are free"
    return typed("describe", view)


def typed(verb: str, view: JobView, *options: str) -> str:
    """A command about the job, to be typed as it stands."""
    return about(verb, Key(view.namespace, view.name), view.place, *options)


def _submit(view: JobView) -> str:
    return f"finetune submit FILE {view.place}".rstrip()


def _sentence(message: str) -> str:
    return message.strip()
