"""An attempt that falls silent is hung; one that has not spoken yet is only starting."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt
from finetune_api.spec import FailurePolicy
from finetune_operator.policies.hang import hang_due
from tests.operator.decide_factories import NOON

POLICY = FailurePolicy(hang_timeout_seconds=600)


def attempt(**fields: Any) -> Attempt:
    return Attempt(**({"number": 1, "ray_job": "j-1", "created_at": NOON, "admitted_at": NOON} | fields))


def at(minutes: float) -> datetime:
    return NOON + timedelta(minutes=minutes)


@pytest.mark.parametrize(
    ("fields", "heartbeat", "due_at"),
    [
        pytest.param({}, at(5), at(15), id="counted from the last report"),
        pytest.param({"running_at": at(7)}, at(5), at(17), id="counted from the first step when that is later"),
        pytest.param({"running_at": at(7)}, None, at(17), id="counted from the first step when the report was lost"),
        pytest.param({"admitted_at": at(30)}, at(29), at(40), id="a report from before a queue gave it back is old"),
    ],
)
def test_silence_is_counted_from_the_last_sign_of_life(
    fields: dict[str, Any], heartbeat: datetime | None, due_at: datetime
) -> None:
    due = hang_due(attempt(**fields), heartbeat, POLICY)
    assert due is not None
    assert (due.at, due.failure_class) == (due_at, FailureClass.HANG)
    assert "600 s (failurePolicy.hangTimeoutSeconds)" in due.message


def test_who_was_at_work_is_told_where_the_trainers_have_said_it() -> None:
    due = hang_due(attempt(), at(5), POLICY, "Training: score (reward length)")
    assert due is not None
    assert due.message.endswith(
        "(failurePolicy.hangTimeoutSeconds). The last report is of Training: score (reward length)."
    )
    unheard = hang_due(attempt(running_at=at(7)), None, POLICY, "Training: score (reward length)")
    assert unheard is not None
    assert "The last report" not in unheard.message, "it is of an earlier start"


def test_an_attempt_that_never_reported_is_not_hung_but_late() -> None:
    assert hang_due(attempt(), None, POLICY) is None


def test_an_attempt_in_a_queue_is_not_hung() -> None:
    assert hang_due(attempt(admitted_at=None), at(0), POLICY) is None
