"""What `finetune run` tells of attempts, however seldom it looks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.job import Attempt, Status
from finetune_client.cli.narrator import Narrator
from finetune_operator.kinds import Key
from tests.factories import job

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = Key("default", "tiny")
JOB = job({"checkpoint": {"everySteps": 2}})


def attempt(number: int, ended: str | None = None, **more: Any) -> Attempt:
    ending = {} if ended is None else {"outcome": ended, "ended_at": NOW + timedelta(seconds=number)}
    return Attempt(number=number, ray_job=f"tiny-{number}", created_at=NOW, **ending, **more)


def told(*looks: Status) -> list[str]:
    sentences: list[str] = []
    narrator = Narrator(sentences.append, lambda: NOW, lambda _: None, several=False)
    for status in looks:
        narrator.look(KEY, JOB, status)
    return sentences


def test_an_attempt_that_begins_and_ends_between_two_looks_is_told_of() -> None:
    first = attempt(1, "Unknown", step=3)
    second = attempt(2, "Succeeded", step=5, resumed_from_step=2)
    begins = "Attempt 2 begins: it goes on from the newest checkpoint, or at step 0 without one"
    sentences = told(Status(), Status(attempts=[first], next_attempt_at=NOW), Status(attempts=[first, second]))
    assert sentences[-2:] == [begins, "Attempt 2 goes on after step 2"]


def test_nothing_is_told_twice() -> None:
    status = Status(attempts=[attempt(1, "Unknown"), attempt(2, resumed_from_step=2)])
    assert told(status, status) == told(status) != []


def test_an_attempt_of_an_earlier_run_does_not_begin_again() -> None:
    first, second = attempt(1, "Unknown"), attempt(2, "Suspended", resumed_from_step=2)
    assert told(Status(attempts=[first, second])) == []
    third = attempt(3, resumed_from_step=4)
    assert told(Status(attempts=[first, second]), Status(attempts=[first, second, third]))[-1] == (
        "Attempt 3 goes on after step 4"
    )
