"""How a job's state reads: phase, conditions and events, from a draft whose facts are settled.

`decide` calls it last. What a pass found out itself (a name that is taken, another job that is waited for) stays as it
was said; the rest follows from the attempts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_api.job import Attempt, Phase
from finetune_api.progress import Progress
from finetune_operator.conditions import (
    Finding,
    artifacts_published,
    checkpointed,
    rollout_faithful,
    rollouts_teach,
    running,
)
from finetune_operator.decision import Event
from finetune_operator.obstacles import Obstacle
from finetune_operator.policies.suspend import Hold
from finetune_operator.states import RayJobState
from finetune_operator.status import Draft, clip
from finetune_operator.times import written

__all__ = ["Scene", "describe", "events", "resized"]

_EVENT_LENGTH = 1024


@dataclass(frozen=True)
class Scene:
    """What the words are about, beside the draft."""

    hold: Hold
    ray_job: RayJobState | None
    """Of the attempt that goes on."""
    obstacle: Obstacle | None
    """What keeps the attempt that goes on from starting."""
    progress: Progress | None
    """What the attempt that goes on said last."""
    leftovers: tuple[str, ...]
    """RayJobs that are active although their attempt is over."""
    queue: str | None
    wants_checkpoints: bool
    save_failure: str | None
    """Why the last try to save a checkpoint failed."""


def describe(draft: Draft, scene: Scene) -> None:
    """Settles phase and conditions."""
    finished = draft.finished_at is not None
    if not finished:
        draft.phase = _phase(draft, scene)
    findings = [
        *(_admitted(draft, scene), _cluster_ready(draft, scene), _running(draft, scene), _suspended(draft, scene)),
        *rollout_faithful(scene.progress),
        *rollouts_teach(scene.progress),
        checkpointed(draft.checkpoint, scene.wants_checkpoints, scene.save_failure),
    ]
    for finding in findings:
        draft.findings.setdefault(finding.type, finding)
    draft.find(artifacts_published(draft.artifacts, finished))


def events(draft: Draft) -> list[Event]:
    """What people should hear of among the conditions that changed."""
    told = []
    for finding in draft.findings.values():
        before = draft.condition(finding.type)
        was = (before.status, before.reason) if before is not None else (None, None)
        if was != (finding.status, finding.reason) and (kind := _kind(finding, *was)) is not None:
            told.append(Event(kind, _event_reason(finding), clip(finding.message, _EVENT_LENGTH)))
    return told


def resized(before: int | None, now: int | None, planned: int) -> list[Event]:
    """What people should hear of a group of workers: of how many training processes it is, if that is new."""
    if now is None or now == (planned if before is None else before):
        return []
    if now < planned:
        why = "there is no room for the others"
        return [Event("Warning", "WorkersMissing", f"Training goes on with {now} of {planned} processes: {why}.")]
    return [Event("Normal", "WorkersComplete", f"Training goes on with all {now} processes: there is room again.")]


def _phase(draft: Draft, scene: Scene) -> Phase:
    attempt = draft.open
    if attempt is not None:
        if attempt.admitted_at is None:
            return Phase.QUEUED
        return Phase.RUNNING if attempt.running_at is not None else Phase.STARTING
    if scene.hold is not Hold.NONE:
        return draft.standing.phase if scene.leftovers else Phase.SUSPENDED
    return Phase.PENDING


def _admitted(draft: Draft, scene: Scene) -> Finding:
    attempt = draft.open
    if attempt is None:
        return Finding("Admitted", "False", *_why_no_attempt(draft, scene))
    if attempt.admitted_at is not None:
        return Finding("Admitted", "True", "Admitted", "The attempt may use its machines.")
    where = f"queue {scene.queue}" if scene.queue else "its queue"
    return Finding("Admitted", "False", "Queued", f"The attempt waits in {where}.")


def _cluster_ready(draft: Draft, scene: Scene) -> Finding:
    attempt, ray_job = draft.open, scene.ray_job
    if scene.leftovers:
        names = ", ".join(scene.leftovers)
        return Finding("ClusterReady", "False", "Deleting", f"RayJob {names} is being ended.")
    if attempt is None:
        return Finding("ClusterReady", "False", *_why_no_attempt(draft, scene))
    if ray_job is not None and ray_job.deleting:
        return Finding("ClusterReady", "False", "Deleting", f"RayJob {ray_job.name} is being deleted.")
    if ray_job is not None and ray_job.running:
        return Finding("ClusterReady", "True", "Running", f"RayJob {ray_job.name} has its cluster.")
    if attempt.admitted_at is None:
        return Finding("ClusterReady", "False", "Queued", "There is no cluster while the attempt waits.")
    if scene.obstacle is not None:
        return Finding("ClusterReady", "False", scene.obstacle.reason, scene.obstacle.message)
    return Finding("ClusterReady", "False", "Starting", f"RayJob {attempt.ray_job} starts its cluster.")


def _running(draft: Draft, scene: Scene) -> Finding:
    attempt = draft.open
    if attempt is not None:
        return running(None, scene.progress if attempt.admitted_at is not None else None)
    last: Attempt | None = draft.last
    if draft.finished_at is not None and last is not None and last.outcome:
        return running(last.outcome, None)
    return Finding("Running", "False", *_why_no_attempt(draft, scene))


def _suspended(draft: Draft, scene: Scene) -> Finding:
    if draft.open is not None and draft.open.stop_asked_at is not None:
        message = f"Attempt {draft.open.number} was asked to save a checkpoint and to stop."
        return Finding("Suspended", "False", "Suspending", message)
    if scene.hold is Hold.NONE:
        return Finding("Suspended", "False", Hold.NONE, "")
    if scene.hold is Hold.FAILURE_POLICY:
        message = "The failure policy holds the job. Set spec.suspend to true and to false again to go on."
        return Finding("Suspended", "True", Hold.FAILURE_POLICY, message)
    if scene.leftovers:
        return Finding("Suspended", "False", "Suspending", "spec.suspend is true; the attempt is being ended.")
    return Finding("Suspended", "True", Hold.REQUESTED, "spec.suspend is true; set it to false to go on.")


def _why_no_attempt(draft: Draft, scene: Scene) -> tuple[str, str]:
    if draft.finished_at is not None:
        return "Finished", "The job has ended."
    if scene.hold is not Hold.NONE:
        return "Suspended", "The job is suspended."
    if draft.next_attempt_at is not None:
        return "BackingOff", f"The next attempt starts at {written(draft.next_attempt_at)}."
    return "NotStarted", "No attempt has started."


def _kind(finding: Finding, was: str | None, why: str | None) -> Literal["Normal", "Warning"] | None:
    """Whether a change of this condition is worth an event, and of which kind. It had status `was` for reason `why`."""
    if finding.type == "Failed" or (finding.type == "Valid" and finding.status == "False"):
        return "Warning"
    if finding.type == "ClusterReady":
        return "Warning" if finding.reason == "NameTaken" else None
    if finding.type == "StatusKept":
        return "Warning" if finding.status == "False" and was != "False" else None
    if finding.type == "Admitted":
        waits = finding.reason in ("Queued", "DependencyPending")
        return "Normal" if waits or (finding.status == "True" and why == "Queued") else None
    if finding.type == "Suspended":
        return "Normal" if finding.status == "True" or (was == "True" and finding.reason == Hold.NONE) else None
    if finding.type == "Checkpointed":
        # The first one is news; of those after it the status tells.
        if finding.reason == "SaveFailed":
            return "Warning" if why != "SaveFailed" else None
        return "Normal" if finding.status == "True" and was != "True" else None
    if finding.type in ("RolloutFaithful", "RolloutsTeach"):
        if finding.status == "False":
            return "Warning" if was != "False" else None
        return "Normal" if was == "False" else None
    return "Normal" if finding.type == "Complete" else None


def _event_reason(finding: Finding) -> str:
    if finding.type == "Suspended":
        return "Resumed" if finding.reason == Hold.NONE else "Suspended"
    if finding.type == "Checkpointed":
        return "CheckpointSaved" if finding.reason == "Saved" else "CheckpointFailed"
    return finding.type if finding.type in ("Complete", "Failed") else finding.reason
