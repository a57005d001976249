"""Who holds a job, and how a hold ends."""

from __future__ import annotations

import pytest

from finetune_api.job import Condition
from finetune_operator.policies.suspend import Hold, hold_on
from tests.operator.decide_factories import NOON


def suspended(status: str, reason: str) -> Condition:
    return Condition.model_validate(
        {"type": "Suspended", "status": status, "reason": reason, "lastTransitionTime": NOON}
    )


@pytest.mark.parametrize(
    ("asked", "before", "failed_into_hold", "hold"),
    [
        pytest.param(False, None, False, Hold.NONE, id="nobody holds a new job"),
        pytest.param(True, None, False, Hold.REQUESTED, id="a person does"),
        pytest.param(False, None, True, Hold.FAILURE_POLICY, id="a failure with action Suspend does"),
        pytest.param(True, None, True, Hold.REQUESTED, id="a person takes the policy's hold over"),
        pytest.param(
            False, suspended("True", "FailurePolicy"), False, Hold.FAILURE_POLICY, id="the policy's hold lasts"
        ),
        pytest.param(
            False, suspended("True", "Requested"), False, Hold.NONE, id="a person's hold ends with their asking"
        ),
        pytest.param(False, suspended("False", "NotSuspended"), False, Hold.NONE, id="what is not held is not held"),
    ],
)
def test_who_holds_the_job(asked: bool, before: Condition | None, failed_into_hold: bool, hold: Hold) -> None:
    assert hold_on(asked, before, failed_into_hold) is hold
