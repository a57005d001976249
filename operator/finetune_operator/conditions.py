"""The conditions of a job's status: each aspect of its state, with a reason for machines and a sentence for people.

Pure. `status.project` calls it; the operator and `finetune run` both show what it says. Complete and Failed are
listed only once they hold, as batch/v1 Jobs do it; the others are always there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from finetune_api.failures import Failure, FailureClass
from finetune_api.job import Condition
from finetune_api.progress import Outcome, Progress, Result, Stage

__all__ = ["Finding", "TRAINING_STAGES", "conditions", "find"]

TRAINING_STAGES = frozenset({Stage.TRAINING, Stage.EVALUATING, Stage.EXPORTING, Stage.DONE})
"""Stages in which the workers have the model and the data; before them the job is starting."""

_MESSAGE_LIMIT = 4096
_JOBS_FAULT = frozenset({FailureClass.USER_ERROR, FailureClass.DATA_ERROR})
"""Failures that running again cannot mend: a person must change the job or its data."""


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
    """All conditions of a job. One whose status did not change since `previous` keeps its transition time."""
    findings = [_valid(outcome), _running(outcome, progress), *_ended(outcome), _artifacts_published(outcome)]
    before = {condition.type: condition for condition in previous}
    return [_dated(finding, before.get(finding.type), now, generation) for finding in findings]


def find(listed: Iterable[Condition], name: str) -> Condition | None:
    """The condition of type `name`, or None."""
    return next((condition for condition in listed if condition.type == name), None)


def _dated(finding: Finding, before: Condition | None, now: datetime, generation: int | None) -> Condition:
    same = before is not None and before.status == finding.status
    return Condition(
        type=finding.type,
        status=finding.status,
        reason=finding.reason,
        message=finding.message[:_MESSAGE_LIMIT],
        last_transition_time=before.last_transition_time if before is not None and same else now,
        observed_generation=generation,
    )


def _valid(outcome: Outcome | None) -> Finding:
    failure = outcome.failure if outcome else None
    if failure is not None and failure.failure_class in _JOBS_FAULT:
        return Finding("Valid", "False", failure.failure_class, _sentences(failure))
    return Finding("Valid", "True", "Accepted", "The job can be run as it is written.")


def _running(outcome: Outcome | None, progress: Progress | None) -> Finding:
    if outcome is not None:
        return Finding("Running", "False", outcome.result, "The run has ended.")
    if progress is None:
        return Finding("Running", "False", "NotStarted", "The run has not reported yet.")
    status: Literal["True", "False"] = "True" if progress.stage in TRAINING_STAGES else "False"
    return Finding("Running", status, progress.stage, progress.message or "")


def _ended(outcome: Outcome | None) -> list[Finding]:
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


def _artifacts_published(outcome: Outcome | None) -> Finding:
    if outcome is None:
        return Finding("ArtifactsPublished", "False", "NotYet", "The model is written after training.")
    if not outcome.artifacts:
        return Finding("ArtifactsPublished", "False", "NoArtifact", "The run ended before a model was written.")
    places = ", ".join(artifact.uri for artifact in outcome.artifacts)
    return Finding("ArtifactsPublished", "True", "Written", f"The trained model is at {places}.")


def _sentences(failure: Failure) -> str:
    return "\n".join([failure.message, *(str(problem) for problem in failure.problems)])


def _steps(outcome: Outcome) -> str:
    total = f" of {outcome.total_steps}" if outcome.total_steps is not None else ""
    return f"{outcome.step}{total} steps"
