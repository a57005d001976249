"""Deadlines for the start of an attempt, and for all attempts together."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt
from finetune_api.spec import Lifecycle
from finetune_operator.policies.deadline import active_due, start_due, used_up
from tests.operator.decide_factories import NOON


def attempt(**fields: Any) -> Attempt:
    return Attempt(**({"number": 1, "ray_job": "j-1", "created_at": NOON, "admitted_at": NOON} | fields))


def after_noon(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def test_an_attempt_is_late_when_its_deadline_has_passed_since_it_was_admitted() -> None:
    due = start_due(attempt(admitted_at=after_noon(500)), False, Lifecycle(start_deadline_seconds=60))
    assert due is not None
    assert (due.at, due.failure_class) == (after_noon(560), FailureClass.START_TIMEOUT)


def test_a_late_start_tells_what_the_pods_say() -> None:
    due = start_due(attempt(), False, Lifecycle(start_deadline_seconds=60), "pod x waits: ImagePullBackOff")
    assert due is not None
    assert due.message.endswith("(lifecycle.startDeadlineSeconds): pod x waits: ImagePullBackOff")


@pytest.mark.parametrize(
    ("fields", "has_reported"),
    [
        pytest.param({"admitted_at": None}, False, id="in a queue"),
        pytest.param({}, True, id="its trainers have reported"),
        pytest.param({"running_at": NOON}, False, id="it has trained"),
    ],
)
def test_the_start_deadline_does_not_hold_for_an_attempt(fields: dict[str, Any], has_reported: bool) -> None:
    assert start_due(attempt(**fields), has_reported, Lifecycle()) is None


@pytest.mark.parametrize(
    ("spent", "seconds"),
    [
        pytest.param(0, 1000, id="the first attempt has it all"),
        pytest.param(400, 600, id="earlier attempts used some of it"),
        pytest.param(5000, 0, id="there is nothing left"),
        pytest.param(-5, 1000, id="a count that somebody made negative gives no more"),
    ],
)
def test_the_active_deadline_is_shared_by_all_attempts(spent: int, seconds: int) -> None:
    due = active_due(attempt(), spent, Lifecycle(active_deadline_seconds=1000))
    assert due is not None
    assert (due.at, due.failure_class) == (after_noon(seconds), FailureClass.DEADLINE_EXCEEDED)


def test_time_in_a_queue_is_free() -> None:
    assert active_due(attempt(admitted_at=None), 0, Lifecycle(active_deadline_seconds=1)) is None


def test_without_a_limit_there_is_no_active_deadline() -> None:
    assert active_due(attempt(), 10**9, Lifecycle()) is None
    assert used_up(10**9, Lifecycle()) is None


def test_no_attempt_starts_when_the_time_is_used_up() -> None:
    assert used_up(999, Lifecycle(active_deadline_seconds=1000)) is None
    assert "1000 s" in (used_up(1000, Lifecycle(active_deadline_seconds=1000)) or "")


def test_a_date_at_the_end_of_the_calendar_is_no_reason_to_fall_over() -> None:
    far = datetime.max.replace(tzinfo=NOON.tzinfo)
    assert active_due(attempt(admitted_at=far), 0, Lifecycle(active_deadline_seconds=31_536_000)) is not None
