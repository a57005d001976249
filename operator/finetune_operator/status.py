"""A job's status: read from what stands in the object, changed during a pass, and written as a document. Pure.

`read_status` takes whatever the API server holds; what cannot be read in it is left out, piece by piece, so that one
bad value costs no attempt. `Draft` is the status while a pass decides it: it starts as the status that stands and only
moves forward. `project` is the status of a run without a cluster; `finetune run` shows it. All of them say how far
training has come in the same words (`job_progress`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import islice
from typing import Any

from pydantic import ValidationError

from finetune_api.base import Contract
from finetune_api.failures import FailureClass
from finetune_api.job import Attempt, Condition, JobProgress, Phase, PostMortem, Resolved, Status
from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact, Outcome, Progress, Result, SavedCheckpoint
from finetune_operator.conditions import TRAINING_STAGES, Finding, conditions, find, updated, why
from finetune_operator.times import sane, whole

__all__ = ["Draft", "clip", "in_brief", "job_progress", "project", "read_status", "without"]

_METRICS_LIMIT = 16
_FIRST_METRICS = (
    "loss",
    "eval_loss",
    "reward",
    "eval_reward",
    "kl",
    "approx_kl",
    "clip_fraction",
    "entropy",
    "value_loss",
    "policy_loss",
    "explained_variance",
    "rollout_gap",
    "steps_left_out",
    "learning_rate",
    "grad_norm",
)
"""What a status holds of more figures than there is room for: what tells whether training goes well. The room that is
left is for rewards that fail, and then for the others as they were reported."""
_ARTIFACTS_LIMIT = 8
_ATTEMPTS_LIMIT = 10
_LINE_LIMIT = 256
_REPAIRS = 32


def read_status(document: Any) -> Status | None:
    """The status in `document`, the raw `status` of a FineTuneJob; None when there is none.

    Fields that are unknown or wrong are left out: a newer operator, or a person, may have written them. Times come
    back with a zone and within the calendar.
    """
    if not isinstance(document, dict) or not document:
        return None
    for _ in range(_REPAIRS):
        try:
            return _with_sane_times(Status.model_validate(document))
        except ValidationError as error:
            document = without(document, [details["loc"] for details in error.errors(include_url=False)])
    return None


class Draft:
    """A status while it is being decided. Nothing in it goes backwards: attempts, counts, the end.

    But for the checkpoint, which goes back to where an attempt began that would not go on from it (`checkpoints`).
    """

    def __init__(self, standing: Status | None, now: datetime, generation: int) -> None:
        """Starts as `standing`. `now` dates what changes, `generation` is the spec's."""
        status = standing or Status()
        self.standing = status
        self._stands = standing is not None
        self.now = whole(now)
        self.generation = generation
        self.phase: Phase = status.phase
        self.method, self.tuning = status.method, status.tuning
        self.resolved: Resolved | None = status.resolved
        self.progress: JobProgress | None = status.progress
        self.checkpoint: SavedCheckpoint | None = status.checkpoint
        self.attempts: list[Attempt] = _in_order(status.attempts)
        self.restarts, self.preemptions = max(0, status.restarts), max(0, status.preemptions)
        self.active_seconds = max(0, status.active_seconds)
        self.next_attempt_at: datetime | None = status.next_attempt_at
        self.failure: FailureClass | None = status.failure
        self.post_mortem: PostMortem | None = status.post_mortem
        self.finished_at: datetime | None = status.finished_at or _end_of(status.conditions)
        self.artifacts: list[Artifact] = status.artifacts
        self.findings: dict[str, Finding] = {}

    def find(self, finding: Finding) -> None:
        """Something was found out in this pass; of one type, the last word counts."""
        self.findings[finding.type] = finding

    def condition(self, name: str) -> Condition | None:
        """The condition of type `name` as it stood before this pass."""
        return find(self.standing.conditions, name)

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def open(self) -> Attempt | None:
        """The attempt that goes on; there is never more than one."""
        attempts = self.attempts
        return attempts[-1] if attempts and attempts[-1].ended_at is None else None

    def change_last(self, **changes: Any) -> Attempt:
        """The newest attempt with other values; an attempt exists."""
        changed = self.attempts[-1].model_copy(update=changes)
        self.attempts[-1] = changed
        return changed

    def add(self, attempt: Attempt) -> None:
        """A new attempt; whatever was open before it is over."""
        self.attempts = [*self.attempts, attempt]

    def to_status(self) -> Status | None:
        """The status as it now is; None when it is the one that stands."""
        last = self.last
        listed = updated(self.standing.conditions, self.findings.values(), self.now, self.generation)
        values: dict[str, Any] = {
            "observed_generation": max(self.generation, self.standing.observed_generation or 0),
            "phase": self.phase,
            **_told(why(self.phase, listed)),
            "method": self.method,
            "tuning": self.tuning,
            "conditions": listed,
            "resolved": self.resolved,
            "progress": self.progress,
            "checkpoint": self.checkpoint,
            "attempts": self.attempts[-_ATTEMPTS_LIMIT:],
            "ray_job": last.ray_job if last is not None else self.standing.ray_job,
            "restarts": self.restarts,
            "preemptions": self.preemptions,
            "active_seconds": self.active_seconds,
            "next_attempt_at": self.next_attempt_at,
            "failure": self.failure,
            "post_mortem": self.post_mortem,
            "finished_at": self.finished_at,
            "artifacts": self.artifacts[:_ARTIFACTS_LIMIT],
        }
        # Values that were only handed on are the same objects, which makes this comparison a cheap one.
        if self._stands and values == vars(self.standing):
            return None
        return Status(**values)


def project(
    outcome: Outcome | None,
    progress: Progress | None,
    now: datetime,
    previous: Status | None = None,
    generation: int | None = None,
    plan: RunPlan | None = None,
) -> Status:
    """The status that follows from the last `progress` and, once the run has ended, its `outcome`.

    `previous` is the status as it stands: conditions that did not change keep their transition times. `plan` is the
    run's, for the names of method and tuning. `generation` is the spec's, written into the status so that a reader
    knows which spec it speaks of.
    """
    failure = outcome.failure if outcome else None
    phase = _phase(outcome, progress)
    listed = conditions(outcome, progress, now, previous.conditions if previous else (), generation)
    return Status(
        observed_generation=generation,
        phase=phase,
        **_told(why(phase, listed)),
        method=plan.method.chosen if plan else None,
        tuning=plan.tuning.chosen if plan else None,
        conditions=listed,
        progress=job_progress(outcome, progress),
        failure=failure.failure_class if failure else None,
        artifacts=outcome.artifacts[:_ARTIFACTS_LIMIT] if outcome else [],
    )


def job_progress(outcome: Outcome | None, progress: Progress | None) -> JobProgress | None:
    """How far training has come: in whole numbers, figures as text. None before the first report."""
    if outcome is None and progress is None:
        return None
    step = max(outcome.step if outcome else 0, progress.step if progress else 0)
    total = outcome.total_steps if outcome and outcome.total_steps is not None else None
    total = total if total is not None else (progress.total_steps if progress else None)
    metrics = (progress.metrics if progress else {}) | (outcome.metrics if outcome else {})
    eta = progress.eta_seconds if progress and outcome is None else None
    return JobProgress(
        step=step,
        total_steps=total,
        epoch=f"{progress.epoch:.2f}" if progress else None,
        percent=min(100, 100 * step // total) if total else None,
        eta_seconds=math.ceil(eta) if eta is not None else None,
        tokens_per_second=_whole(progress.tokens_per_second if progress else None),
        world_size=progress.world_size if progress else None,
        metrics=_as_text(metrics),
        updated_at=progress.updated_at if progress else None,
    )


def in_brief(message: str) -> str:
    """`message` in a line, as a column has room for it."""
    return clip(" ".join(message.split()), _LINE_LIMIT)


def clip(text: str, length: int) -> str:
    """`text`, cut to what a field may hold."""
    return text if len(text) <= length else text[: length - 1] + "…"


def without(document: Any, places: Iterable[tuple[int | str, ...]]) -> Any:
    """A copy of `document` with what stands at `places` taken out; where nothing stands, what should hold it."""
    repaired = copy.deepcopy(document)
    found = {_nearest(repaired, place) for place in places}
    # The last entries of a list first: taking one out moves those behind it.
    for place in sorted(found, key=lambda place: [(str(type(step)), step) for step in place], reverse=True):
        holder = repaired
        for step in place[:-1]:
            holder = holder[step]
        if place and _has(holder, place[-1]):
            del holder[place[-1]]
    return repaired


def _told(condition: Condition | None) -> dict[str, Any]:
    if condition is None:
        return {"reason": None, "message": None}
    return {"reason": condition.reason, "message": in_brief(condition.message)}


def _phase(outcome: Outcome | None, progress: Progress | None) -> Phase:
    if outcome is not None:
        return Phase.SUCCEEDED if outcome.result is Result.SUCCEEDED else Phase.FAILED
    if progress is None:
        return Phase.PENDING
    return Phase.RUNNING if progress.stage in TRAINING_STAGES else Phase.STARTING


def _whole(value: float | None) -> int | None:
    return round(value) if value is not None else None


def _as_text(metrics: Mapping[str, float]) -> dict[str, str]:
    """Figures as strings: the API server would otherwise turn 1.0 into 1 and refuse it as a float."""
    failing = [name for name in metrics if name.startswith("reward_errors/")]
    first = {name: metrics[name] for name in (*_FIRST_METRICS, *failing) if name in metrics}
    return {name: f"{value:.6g}" for name, value in islice({**first, **metrics}.items(), _METRICS_LIMIT)}


def _in_order(attempts: list[Attempt]) -> list[Attempt]:
    """By number, each once: whatever a person made of the list."""
    if len(attempts) < 2:
        return list(attempts)
    by_number = {attempt.number: attempt for attempt in attempts}
    return [by_number[number] for number in sorted(by_number)]


def _end_of(listed: Iterable[Condition]) -> datetime | None:
    """When a job ended whose status names no moment: a condition that says so counts too."""
    ended = [one for one in listed if one.type in ("Complete", "Failed") and one.status == "True"]
    return min((one.last_transition_time for one in ended), default=None)


def _nearest(document: Any, place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The longest beginning of `place` at which something stands."""
    here = document
    for depth, step in enumerate(place):
        if not _has(here, step):
            return place[:depth]
        here = here[step]
    return place


def _has(value: Any, step: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _with_sane_times(status: Status) -> Status:
    moments = [status.next_attempt_at, status.finished_at, *(one.last_transition_time for one in status.conditions)]
    for attempt in status.attempts:
        moments += (attempt.created_at, attempt.admitted_at, attempt.running_at, attempt.ended_at)
        moments.append(attempt.stop_asked_at)
    if status.progress is not None:
        moments.append(status.progress.updated_at)
    if status.checkpoint is not None:
        moments.append(status.checkpoint.saved_at)
    if all(one is None or (one.tzinfo is not None and 2000 <= one.year < 2200) for one in moments):
        return status
    sane_status: Status = _sane_model(status)
    return sane_status


def _sane_model(value: Any) -> Any:
    if isinstance(value, datetime):
        return sane(value)
    if isinstance(value, list):
        return [_sane_model(one) for one in value]
    if isinstance(value, Contract):
        return value.model_copy(update={name: _sane_model(one) for name, one in value})
    return value
