"""A job's status, projected from what its run reported: pure, so that a laptop and a cluster say the same.

Called by the operator after each observation and by `finetune run` at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from itertools import islice

from finetune_api.job import JobProgress, Phase, Status
from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome, Progress, Result
from finetune_operator.conditions import TRAINING_STAGES, conditions

__all__ = ["project"]

_METRICS_LIMIT = 16
_ARTIFACTS_LIMIT = 8


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
    return Status(
        observed_generation=generation,
        phase=_phase(outcome, progress),
        method=plan.method.chosen if plan else None,
        tuning=plan.tuning.chosen if plan else None,
        conditions=conditions(outcome, progress, now, previous.conditions if previous else (), generation),
        progress=_progress(outcome, progress),
        failure=failure.failure_class if failure else None,
        artifacts=outcome.artifacts[:_ARTIFACTS_LIMIT] if outcome else [],
    )


def _phase(outcome: Outcome | None, progress: Progress | None) -> Phase:
    if outcome is not None:
        return Phase.SUCCEEDED if outcome.result is Result.SUCCEEDED else Phase.FAILED
    if progress is None:
        return Phase.PENDING
    return Phase.RUNNING if progress.stage in TRAINING_STAGES else Phase.STARTING


def _progress(outcome: Outcome | None, progress: Progress | None) -> JobProgress | None:
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
        metrics=_as_text(metrics),
        updated_at=progress.updated_at if progress else None,
    )


def _whole(value: float | None) -> int | None:
    return round(value) if value is not None else None


def _as_text(metrics: Mapping[str, float]) -> dict[str, str]:
    """Figures as strings: the API server would otherwise turn 1.0 into 1 and refuse it as a float."""
    return {name: f"{value:.6g}" for name, value in islice(metrics.items(), _METRICS_LIMIT)}
