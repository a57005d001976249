"""Why an attempt ended: one class of failure from everything that was seen of it.

Evidence is asked in the order of how much it knows:

1. the trainers' own outcome, when it is this attempt's and gives a class
2. the exit code of the entrypoint, in Ray's message
3. the pods: killed for memory, evicted, preempted, on a node that is gone
4. signatures in the message and in the end of the log that it carries
5. KubeRay's own reason

Two ends are nobody's word alone. Trainers that only know that a worker died, and trainers that were told to stop, say
so at once; what killed the worker, or stopped them, the pods and KubeRay tell a moment later. So these two wait for
the RayJob's end. Called by `decide`; pure and total.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from finetune_api.failures import EXIT_CODES, INTERRUPTED, FailureClass, failure_class_of
from finetune_api.job import PostMortem
from finetune_api.progress import Outcome, Result
from finetune_operator import names
from finetune_operator.policies.signatures import KUBERAY_REASONS, PLATFORM, POD_SIGNS, TEXT_SIGNS
from finetune_operator.states import PodState, RayJobState, Report

__all__ = ["CANCELLED", "SUCCEEDED", "Ending", "classify", "evidence"]

SUCCEEDED = Result.SUCCEEDED.value
CANCELLED = Result.CANCELLED.value

_MESSAGE_LIMIT = 4096
_HEADLINE = 512
_EXIT_CODE = re.compile(r"failed with exit code (-?\d{1,4})\b")
_STOPPED_BY_SIGNAL = frozenset({INTERRUPTED, 128 + 15})
_BEING_SUSPENDED = frozenset({"Suspending", "Suspended"})


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    outcome: str
    """Succeeded, Cancelled, or the class of the failure."""
    failure_class: FailureClass | None = None
    exit_code: int | None = None
    """Of the entrypoint; of a pod's container where only that is known."""
    pod: str | None = None
    """The pod that failed first, where that is known."""
    reason: str = ""
    """Kubernetes', Ray's or KubeRay's own word."""
    message: str = ""
    """In sentences, with the last lines of the log; at most 4096 characters."""
    step: int = 0
    """Optimizer steps that were reported."""
    reported: bool = False
    """The trainers themselves said so. A success that they have not reported yet has no artifacts yet either."""


def classify(
    ray_job: RayJobState | None,
    pods: Sequence[PodState],
    report: Report,
    *,
    attempt: int | None = None,
    seen: PostMortem | None = None,
) -> Ending | None:
    """How the attempt ended, or None while it goes on.

    `attempt` is its number, for a RayJob that is gone or carries no label. `seen` is what `evidence` found while it
    went on: pods that failed are soon replaced.
    """
    number = attempt if attempt is not None else ray_job.attempt if ray_job is not None else None
    told = report if number is not None and report.attempt == number else Report()
    own = [pod for pod in pods if pod.attempt == number]
    earlier = seen if seen is not None and seen.attempt == number else None
    ending = _ending(ray_job, own, _of_this_run(told, ray_job), earlier)
    steps = [told.progress.step if told.progress else 0, told.outcome.step if told.outcome else 0]
    return replace(ending, step=max(steps), message=_shortened(ending.message)) if ending is not None else None


def evidence(pods: Iterable[PodState]) -> Ending | None:
    """What a pod that has failed tells of the attempt that is about to; None when none has.

    For pods of an attempt that still goes on: after its end they are all taken down, and some of those fail.
    """
    listed = list(pods)
    found = _clue(listed)
    if found is not None:
        return found
    failed = next((pod for pod in listed if pod.failed), None)
    if failed is None:
        return None
    code = f" with exit code {failed.exit_code}" if failed.exit_code is not None else ""
    return _failure(
        FailureClass.UNKNOWN,
        f"Pod {failed.name} failed{code}.",
        reason=failed.terminated_reason or failed.reason,
        pod=failed.name,
        exit_code=failed.exit_code,
    )


def _of_this_run(told: Report, ray_job: RayJobState | None) -> Report:
    """The report without an outcome that is older than the RayJob's start: a queue may suspend a RayJob and start it
    again, and what the trainers said the first time is history. A success is not: nothing would start after it."""
    outcome, progress = told.outcome, told.progress
    if outcome is None or progress is None or ray_job is None or ray_job.started_at is None:
        return told
    old = outcome.result is not Result.SUCCEEDED and progress.updated_at < ray_job.started_at
    return replace(told, outcome=None) if old else told


def _ending(
    ray_job: RayJobState | None, pods: Sequence[PodState], told: Report, seen: PostMortem | None
) -> Ending | None:
    outcome = told.outcome
    clue = _clue(pods) or _remembered(seen)
    over = ray_job is None or ray_job.finished
    if outcome is not None and (over or _says_all(outcome)):
        return _told(outcome, clue, ray_job)
    if ray_job is None or ray_job.suspended or ray_job.deleting or ray_job.deployment_status in _BEING_SUSPENDED:
        return None
    return _finished(ray_job, clue) if ray_job.finished else _headless(ray_job, pods, clue)


def _says_all(outcome: Outcome) -> bool:
    """Is nothing to be learnt by waiting for the RayJob's own end?"""
    if outcome.result is Result.FAILED:
        return outcome.failure is not None and outcome.failure.failure_class is not FailureClass.UNKNOWN
    return outcome.result is Result.SUCCEEDED


def _told(outcome: Outcome, clue: Ending | None, ray_job: RayJobState | None) -> Ending:
    """The end as the trainers tell it; where they do not know, with what else is known."""
    if outcome.result is Result.SUCCEEDED:
        return Ending(SUCCEEDED, exit_code=0, reported=True)
    if outcome.result is Result.CANCELLED:
        return replace(_stopped(clue, ray_job), reported=True)
    failure = outcome.failure
    kind = failure.failure_class if failure is not None else FailureClass.UNKNOWN
    message = "" if failure is None else "\n".join([failure.message, *map(str, failure.problems)])
    told = _failure(kind, message, reason=kind.value, exit_code=EXIT_CODES[kind], reported=True)
    if kind is not FailureClass.UNKNOWN:
        return told
    log = ray_job.message if ray_job is not None else ""
    better = _telling(clue) or _signature(f"{message}\n{log}")
    if better is None:
        return replace(told, pod=clue.pod) if clue is not None else told
    return replace(better, message=f"{better.message}\n{message}", exit_code=better.exit_code or 1, reported=True)


def _stopped(clue: Ending | None, ray_job: RayJobState | None) -> Ending:
    """The trainers were told to stop. By a person, when Ray says so; otherwise the end of their pod told them."""
    if clue is not None and clue.failure_class in PLATFORM:
        return clue
    if ray_job is None or ray_job.job_status in ("STOPPED", "SUCCEEDED"):
        message = "The run was stopped."
        return Ending(CANCELLED, exit_code=INTERRUPTED, reason="Stopped", message=message)
    if (telling := _telling(clue)) is not None:
        return telling
    message = "The trainers were told to stop by no person and by no policy, as happens when their pod is deleted."
    return _failure(FailureClass.PREEMPTED, message, reason="Stopped", exit_code=INTERRUPTED)


def _headless(ray_job: RayJobState, pods: Sequence[PodState], clue: Ending | None) -> Ending | None:
    """The head of a running RayJob has failed or is gone. It is not replaced, and KubeRay would wait for it for ever.

    Workers are made after the head: where they are seen and it is not, it was there before.
    """
    if not ray_job.running or not pods:
        return None
    heads = [pod for pod in pods if pod.role == names.HEAD]
    if any(not pod.failed and pod.phase != "Succeeded" for pod in heads):
        return None
    if (telling := _telling(clue)) is not None:
        return telling
    if not heads:
        return _failure(FailureClass.NODE_LOST, "The head pod is gone.", reason="HeadGone")
    return evidence(heads) or _failure(FailureClass.UNKNOWN, f"Pod {heads[0].name} has ended.", pod=heads[0].name)


def _finished(ray_job: RayJobState, clue: Ending | None) -> Ending:
    """The end without a word from the trainers."""
    if ray_job.succeeded:
        return Ending(SUCCEEDED, exit_code=0, message=ray_job.message)
    code = _exit_code(ray_job.message)
    if ray_job.job_status == "STOPPED" or code in _STOPPED_BY_SIGNAL:
        return _stopped(clue, ray_job)
    kind = failure_class_of(code) if code is not None else FailureClass.UNKNOWN
    if kind is not FailureClass.UNKNOWN:
        return _failure(kind, ray_job.message, reason=ray_job.reason, exit_code=code)
    found = _telling(clue) or _signature(ray_job.message)
    if found is not None:
        message = f"{found.message}\n{ray_job.message}"
        return replace(found, message=message, exit_code=code if code is not None else found.exit_code)
    kind, says = KUBERAY_REASONS.get(ray_job.reason, (FailureClass.UNKNOWN, ""))
    known = [_sentence(says), clue.message if clue is not None else "", ray_job.message]
    message = "\n".join(part for part in known if part) or "The RayJob failed and left no reason."
    pod = clue.pod if clue is not None else None
    return _failure(kind, message, reason=ray_job.reason, exit_code=code, pod=pod)


def _clue(pods: Iterable[PodState]) -> Ending | None:
    """What the pods tell: the uppermost row of the table that any of them matches."""
    listed = [pod for pod in pods if pod.reason or pod.disruption or pod.terminated_reason or pod.phase == "Unknown"]
    for sign in POD_SIGNS if listed else ():
        pod = next((one for one in listed if sign.holds(one)), None)
        if pod is None:
            continue
        detail = f": {pod.message}" if pod.message else "."
        message = f"Pod {pod.name} {sign.says}{detail}"
        reason = pod.disruption or pod.reason or pod.terminated_reason or pod.phase
        return _failure(sign.failure_class, message, reason=reason, pod=pod.name, exit_code=pod.exit_code)
    return None


def _telling(clue: Ending | None) -> Ending | None:
    """The clue, if it says more than that a pod failed."""
    return clue if clue is not None and clue.failure_class is not FailureClass.UNKNOWN else None


def _remembered(seen: PostMortem | None) -> Ending | None:
    if seen is None:
        return None
    return _failure(seen.failure_class, seen.message, reason=seen.reason or "", pod=seen.pod, exit_code=seen.exit_code)


def _signature(text: str) -> Ending | None:
    """What the words of a message or a log tell."""
    sign = next((sign for sign in TEXT_SIGNS if sign.pattern.search(text)), None)
    if sign is None:
        return None
    return _failure(sign.failure_class, _sentence(sign.says), reason=sign.failure_class.value)


def _failure(
    kind: FailureClass,
    message: str,
    *,
    reason: str = "",
    pod: str | None = None,
    exit_code: int | None = None,
    reported: bool = False,
) -> Ending:
    return Ending(kind.value, kind, exit_code, pod, reason, message, reported=reported)


def _exit_code(message: str) -> int | None:
    """The entrypoint's exit code as Ray tells it; after signal n it says -n, and shells 128 + n."""
    found = _EXIT_CODE.search(message)
    if found is None:
        return None
    code = int(found[1])
    return 128 - code if code < 0 else code


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _shortened(message: str) -> str:
    """The beginning, which says what happened, and the end, which holds the last lines of the log."""
    if len(message) <= _MESSAGE_LIMIT:
        return message
    gap = "\n[...]\n"
    return message[:_HEADLINE] + gap + message[len(message) - (_MESSAGE_LIMIT - _HEADLINE - len(gap)) :]
