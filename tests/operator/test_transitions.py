"""What the step from one status to the next adds to the metrics, with numbers worked out by hand."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.job import Attempt, Status
from finetune_operator.metrics import Metrics
from finetune_operator.transitions import count_transition, goodput

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)


def attempt(
    number: int, step: int, resumed: int | None, created: int, running: int | None, ended: int, saved: int | None = None
) -> Attempt:
    """Times are seconds from the beginning. `resumed` None: it never trained."""
    return Attempt(
        number=number,
        ray_job=f"tiny-{number}",
        created_at=BEGIN + timedelta(seconds=created),
        admitted_at=BEGIN + timedelta(seconds=created),
        running_at=None if running is None else BEGIN + timedelta(seconds=running),
        ended_at=BEGIN + timedelta(seconds=ended),
        outcome="Succeeded" if step == 100 else "NodeLost",
        step=step,
        resumed_from_step=resumed,
        checkpoint_step=saved,
    )


@pytest.mark.parametrize(
    ("attempts", "share"),
    [
        # 100 s, of which 10 went into starting.
        ([attempt(1, 100, 0, 0, 10, 100)], 0.9),
        # 60 steps in 60 s, 20 of them done again: 40 s kept; then 60 steps in 60 s. 140 s in all with two starts.
        ([attempt(1, 60, 0, 0, 10, 70), attempt(2, 100, 40, 70, 80, 140)], (40 + 60) / 140),
        # The first attempt never came to a step.
        ([attempt(1, 0, None, 0, None, 50), attempt(2, 100, 0, 50, 50, 100)], 0.5),
        # Nothing was kept of the first.
        ([attempt(1, 60, 0, 0, 0, 60), attempt(2, 100, 0, 60, 60, 120)], 0.5),
        # As in the second row, and in between an attempt that waited for machines for 60 s, in vain.
        (
            [attempt(1, 60, 0, 0, 10, 70), attempt(2, 0, None, 70, None, 130), attempt(3, 100, 40, 130, 140, 200)],
            (40 + 60) / 200,
        ),
        # The second went on after 40, came to 50 and left nothing newer: its 10 s are lost as well.
        (
            [attempt(1, 40, 0, 0, 0, 40), attempt(2, 50, 40, 40, 40, 50), attempt(3, 100, 40, 50, 50, 110)],
            (40 + 60) / 110,
        ),
        # A job that failed keeps what it has saved: half of its steps.
        ([attempt(1, 80, 0, 0, 0, 80, saved=40)], 0.5),
        ([], None),
    ],
    ids=[
        *("one attempt", "steps done again", "a start in vain", "from the beginning again"),
        *("a start in vain in between", "an attempt that saved nothing", "a job that failed", "no attempt"),
    ],
)
def test_goodput_is_the_share_of_time_that_went_into_steps_that_were_kept(
    attempts: list[Attempt], share: float | None
) -> None:
    assert goodput(Status(attempts=attempts)) == (None if share is None else pytest.approx(share))


def job(status: Status | None) -> dict[str, Any]:
    metadata = {"name": "tiny", "creationTimestamp": "2030-01-01T00:00:00Z"}
    return {"metadata": metadata, "status": status.to_document() if status else None}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_an_end_is_counted_by_its_outcome_when_it_is_first_written() -> None:
    metrics = Metrics()
    first, second = attempt(1, 60, 0, 0, 10, 70), attempt(2, 100, 40, 70, 80, 140)
    going_on = first.model_copy(update={"ended_at": None, "outcome": None})
    count_transition(metrics, job(Status(attempts=[going_on])), Status(attempts=[first]).to_document())
    ended = Status(attempts=[first, second], finished_at=BEGIN)
    count_transition(metrics, job(Status(attempts=[first])), ended.to_document())
    count_transition(metrics, job(ended), ended.to_document())
    assert value(metrics, "finetune_attempts_total", outcome="NodeLost") == 1
    assert value(metrics, "finetune_attempts_total", outcome="Succeeded") == 1
    assert value(metrics, "finetune_goodput_ratio_count") == 1


def test_the_time_to_the_first_step_is_the_jobs_not_the_attempts() -> None:
    metrics = Metrics()
    first, second = attempt(1, 60, 0, 0, 30, 70), attempt(2, 100, 40, 70, 80, 140)
    count_transition(metrics, job(None), Status(attempts=[first]).to_document())
    count_transition(metrics, job(Status(attempts=[first])), Status(attempts=[first, second]).to_document())
    assert value(metrics, "finetune_time_to_first_step_seconds_count") == 1
    assert value(metrics, "finetune_time_to_first_step_seconds_sum") == 30


def test_a_status_that_cannot_be_read_is_not_counted_and_harms_nobody() -> None:
    metrics = Metrics()
    count_transition(metrics, {"metadata": {}, "status": {"attempts": "many"}}, {"phase": "Flying"})
    assert value(metrics, "finetune_goodput_ratio_count") == 0
