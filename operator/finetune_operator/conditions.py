"""The conditions of a job's status: each aspect of its state, with a reason for machines and a sentence for people.

Pure. A `Finding` is what holds and why; `updated` turns findings into conditions and gives each the time at which its
status last changed. The reconcile pass makes its own findings; those that follow from a run's report alone are made
here, because `finetune run` shows them too. Complete and Failed are listed only once they hold, as batch/v1 Jobs do it;
the others stay once they were said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from finetune_api.failures import Failure, FailureClass
from finetune_api.job import Condition, Phase
from finetune_api.progress import Artifact, Outcome, Progress, Result, SavedCheckpoint, Stage

__all__ = [
    "JOBS_FAULT",
    "TRAINING_STAGES",
    "Finding",
    "artifacts_published",
    "checkpointed",
    "conditions",
    "ended",
    "find",
    "rollout_faithful",
    "rollouts_teach",
    "running",
    "updated",
    "why",
]

TRAINING_STAGES = frozenset({Stage.TRAINING, Stage.EVALUATING, Stage.EXPORTING, Stage.DONE})
"""Stages in which the workers have the model and the data; before them the job is starting."""
JOBS_FAULT = frozenset({FailureClass.USER_ERROR, FailureClass.DATA_ERROR})
"""Failures that running again cannot mend: a person must change the job or its data."""

_MESSAGE_LIMIT = 4096
_ORDER = (
    *("Valid", "Admitted", "ClusterReady", "Running", "RolloutFaithful", "RolloutsTeach", "Checkpointed", "Suspended"),
    *("ArtifactsPublished", "StatusKept", "Complete", "Failed"),
)
_ORDINARY = frozenset({"Deleting", "NotStarted", "Queued", "Starting", "Suspended"})
"""Reasons that say no more than the phase."""
_PLACES = {name: place for place, name in enumerate(_ORDER)}


@dataclass(frozen=True)
class Finding:
    """A condition before it has a time: what holds, and why."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


def conditions(
    outcome: Outcome | None,
    progress: Progress | None,
    now: datetime,
    previous: Iterable[Condition] = (),
    generation: int | None = None,
) -> list[Condition]:
    """All conditions of a run without a cluster. One whose status did not change keeps its transition time."""
    published = artifacts_published(outcome.artifacts if outcome else (), outcome is not None)
    goes_on = running(outcome.result if outcome else None, progress)
    findings = [
        _valid(outcome),
        goes_on,
        *rollout_faithful(progress),
        *rollouts_teach(progress),
        *ended(outcome),
        published,
    ]
    before = {condition.type: condition for condition in previous}
    return [_dated(finding, before.get(finding.type), now, generation) for finding in findings]


def updated(
    previous: Iterable[Condition], findings: Iterable[Finding], now: datetime, generation: int | None
) -> list[Condition]:
    """`previous` with what was found now; a condition of which nothing was said stays as it is."""
    listed = {condition.type: condition for condition in previous}
    for finding in findings:
        listed[finding.type] = _dated(finding, listed.get(finding.type), now, generation)
    return sorted(listed.values(), key=_place)


def find(listed: Iterable[Condition], name: str) -> Condition | None:
    """The condition of type `name`, or None."""
    return next((condition for condition in listed if condition.type == name), None)


def why(phase: Phase, listed: Iterable[Condition]) -> Condition | None:
    """The condition that tells why a job waits or has failed; None where nothing is to be told beyond the phase."""
    if phase is Phase.SUCCEEDED:
        return None
    telling = {"Failed": "True", "Valid": "False"}
    if phase is not Phase.RUNNING:
        telling |= {"Suspended": "True", "ClusterReady": "False", "Admitted": "False"}
    telling["StatusKept"] = "False"
    said = {condition.type: condition for condition in listed if condition.reason not in _ORDINARY}
    return next((said[type] for type, status in telling.items() if type in said and said[type].status == status), None)


def running(result: str | None, progress: Progress | None) -> Finding:
    """Whether the trainers train. `result` is how the run ended, None while it goes on."""
    if result is not None:
        return Finding("Running", "False", result, "The run has ended.")
    if progress is None:
        return Finding("Running", "False", "NotStarted", "The run has not reported yet.")
    status: Literal["True", "False"] = "True" if progress.stage in TRAINING_STAGES else "False"
    return Finding("Running", status, progress.stage, progress.message or (progress.doing if progress.phase else ""))


def rollout_faithful(progress: Progress | None) -> list[Finding]:
    """Whether what another engine writes is what the policy would write; nothing where no other engine has written."""
    gap = progress.rollout_gap if progress is not None else None
    if gap is None:
        return []
    if gap.is_over:
        return [Finding("RolloutFaithful", "False", "GapOverLimit", gap.sentence)]
    return [Finding("RolloutFaithful", "True", "GapWithinLimit", gap.sentence)]


def rollouts_teach(progress: Progress | None) -> list[Finding]:
    """Whether there is something to learn from what the model writes; nothing where that is not known."""
    lesson = progress.lesson if progress is not None else None
    if lesson is None:
        return []
    return [Finding("RolloutsTeach", "True" if lesson.teaches else "False", lesson, lesson.sentence)]


def ended(outcome: Outcome | None) -> list[Finding]:
    """Complete or Failed, once a run has left its outcome."""
    if outcome is None:
        return []
    if outcome.result is Result.SUCCEEDED:
        reason = "StoppedEarly" if outcome.stopped_early else "Succeeded"
        return [Finding("Complete", "True", reason, f"Training ended after {_steps(outcome)}.")]
    if outcome.result is Result.CANCELLED:
        return [Finding("Failed", "True", "Cancelled", f"The run was stopped after {_steps(outcome)}.")]
    if outcome.failure is None:
        return [Finding("Failed", "True", FailureClass.UNKNOWN, "The run failed and left no reason.")]
    return [Finding("Failed", "True", outcome.failure.failure_class, _sentences(outcome.failure))]


def artifacts_published(artifacts: Iterable[Artifact], is_over: bool) -> Finding:
    """Whether there is a trained model."""
    places = ", ".join(artifact.uri for artifact in artifacts)
    if places:
        return Finding("ArtifactsPublished", "True", "Written", f"The trained model is at {places}.")
    if is_over:
        return Finding("ArtifactsPublished", "False", "NoArtifact", "The run ended before a model was written.")
    return Finding("ArtifactsPublished", "False", "NotYet", "The model is written after training.")


def checkpointed(newest: SavedCheckpoint | None, is_asked: bool, save_failure: str | None) -> Finding:
    """Whether there is a checkpoint that another attempt could go on from.

    `is_asked`: the job wants checkpoints. `save_failure` is why the last try to save one failed, None when it did not.
    """
    kept = f"Step {newest.step} is saved at {newest.uri}." if newest is not None else ""
    if save_failure:
        message = f"The last try to save failed: {save_failure}"
        return Finding("Checkpointed", "True" if kept else "False", "SaveFailed", f"{kept}\n{message}".strip())
    if kept:
        return Finding("Checkpointed", "True", "Saved", kept)
    if not is_asked:
        message = "The job has no spec.checkpoint: nothing is saved, and another attempt begins at step 0."
        return Finding("Checkpointed", "False", "NotAsked", message)
    return Finding("Checkpointed", "False", "NotYet", "No checkpoint is there yet.")


def _place(condition: Condition) -> int:
    return _PLACES.get(condition.type, len(_PLACES))


def _dated(finding: Finding, before: Condition | None, now: datetime, generation: int | None) -> Condition:
    message = finding.message if len(finding.message) <= _MESSAGE_LIMIT else finding.message[: _MESSAGE_LIMIT - 1] + "…"
    if before is not None and _same(before, finding, message, generation):
        return before
    unchanged = before is not None and before.status == finding.status
    return Condition(
        type=finding.type,
        status=finding.status,
        reason=finding.reason,
        message=message,
        last_transition_time=before.last_transition_time if before is not None and unchanged else now,
        observed_generation=generation,
    )


def _same(before: Condition, finding: Finding, message: str, generation: int | None) -> bool:
    """Whether the condition already says all this: in most passes, nearly all of them do."""
    return (
        before.status == finding.status
        and before.reason == finding.reason
        and before.message == message
        and before.observed_generation == generation
    )


def _valid(outcome: Outcome | None) -> Finding:
    failure = outcome.failure if outcome else None
    if failure is not None and failure.failure_class in JOBS_FAULT:
        return Finding("Valid", "False", failure.failure_class, _sentences(failure))
    return Finding("Valid", "True", "Accepted", "The job can be run as it is written.")


def _sentences(failure: Failure) -> str:
    return "\n".join([failure.message, *(str(problem) for problem in failure.problems)])


def _steps(outcome: Outcome) -> str:
    total = f" of {outcome.total_steps}" if outcome.total_steps is not None else ""
    return f"{outcome.step}{total} steps"
