"""What follows from a failure: the job's rules, each class's default, the budgets, and the end of trying."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.job import Attempt
from finetune_api.spec import Action, FailurePolicy
from finetune_operator.policies.restart import DEFAULT_ACTIONS, History, Verdict, halved, judge
from tests.operator.decide_factories import NOON

MiB = 1 << 20


def policy(**fields: Any) -> FailurePolicy:
    return FailurePolicy.model_validate(fields)


def attempts(*steps: int, action: Action | None = Action.RETRY) -> list[Attempt]:
    """Attempts that came so far; the last one has just failed."""
    made = [
        Attempt(number=n, ray_job=f"j-{n}", created_at=NOON + timedelta(hours=n), step=step, action=action)
        for n, step in enumerate(steps, start=1)
    ]
    return [*made[:-1], made[-1].model_copy(update={"action": None})] if made else []


def verdict(
    failure: FailureClass = FailureClass.UNKNOWN,
    *,
    exit_code: int | None = None,
    message: str = "",
    history: History | None = None,
    **fields: Any,
) -> Verdict:
    return judge(failure, exit_code, message, history or History(attempts(5)), policy(**fields))


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        (FailureClass.PREEMPTED, Action.RETRY_FREE),
        (FailureClass.NODE_LOST, Action.RETRY),
        (FailureClass.STORAGE_ERROR, Action.RETRY),
        (FailureClass.HANG, Action.RETRY),
        (FailureClass.START_TIMEOUT, Action.RETRY),
        (FailureClass.UNKNOWN, Action.RETRY),
        (FailureClass.OUT_OF_MEMORY, Action.RETRY_WITH_SMALLER_MICRO_BATCH),
        (FailureClass.USER_ERROR, Action.FAIL),
        (FailureClass.DATA_ERROR, Action.FAIL),
        (FailureClass.NON_FINITE_LOSS, Action.FAIL),
        (FailureClass.DEPENDENCY_FAILED, Action.FAIL),
        (FailureClass.DEADLINE_EXCEEDED, Action.FAIL),
    ],
)
def test_each_class_of_failure_has_its_default(failure: FailureClass, action: Action) -> None:
    assert verdict(failure).action is action


def test_no_class_of_failure_is_without_a_default() -> None:
    assert set(DEFAULT_ACTIONS) == set(FailureClass)


FAIL_ON_NODE_LOST = {"classes": ["NodeLost"], "action": "Fail"}
SUSPEND_ON_ALL = {"action": "Suspend"}


@pytest.mark.parametrize(
    ("rules", "failure", "exit_code", "message", "action"),
    [
        pytest.param([FAIL_ON_NODE_LOST], "NodeLost", None, "", Action.FAIL, id="a rule goes before the default"),
        pytest.param([FAIL_ON_NODE_LOST], "Hang", None, "", Action.RETRY, id="a rule for another class does not match"),
        pytest.param(
            [FAIL_ON_NODE_LOST, SUSPEND_ON_ALL],
            "NodeLost",
            None,
            "",
            Action.FAIL,
            id="the first rule that matches wins",
        ),
        pytest.param(
            [FAIL_ON_NODE_LOST, SUSPEND_ON_ALL],
            "Hang",
            None,
            "",
            Action.SUSPEND,
            id="a rule without classes is for all",
        ),
        pytest.param(
            [{"exitCodes": [42], "action": "Fail"}], "Unknown", 42, "", Action.FAIL, id="an exit code that is listed"
        ),
        pytest.param(
            [{"exitCodes": [42], "action": "Fail"}], "Unknown", 41, "", Action.RETRY, id="an exit code that is not"
        ),
        pytest.param(
            [{"exitCodes": [0], "action": "Fail"}], "Unknown", None, "", Action.RETRY, id="no exit code is not code 0"
        ),
        pytest.param(
            [{"messagePattern": "QUOTA", "action": "Fail"}],
            *("StorageError", None, "disk quota exceeded", Action.FAIL),
            id="upper and lower case are alike",
        ),
        pytest.param(
            [{"messagePattern": "rank * timed out", "action": "Fail"}],
            *("Unknown", None, "NCCL: rank 3 of 8\nhas timed out", Action.FAIL),
            id="a star stands for anything, line ends included",
        ),
        pytest.param(
            [{"messagePattern": "timed out*rank", "action": "Fail"}],
            *("Unknown", None, "rank 3 timed out", Action.RETRY),
            id="the parts have an order",
        ),
        pytest.param(
            [{"messagePattern": "[a-z]?", "action": "Fail"}],
            *("Unknown", None, "ab", Action.RETRY),
            id="nothing but the star is special",
        ),
        pytest.param(
            [{"classes": ["Unknown"], "exitCodes": [1], "messagePattern": "boom", "action": "Fail"}],
            *("Unknown", 1, "bang", Action.RETRY),
            id="all conditions of a rule must hold",
        ),
        pytest.param(
            [{"classes": ["UserError"], "action": "Retry"}],
            *("UserError", 2, "", Action.RETRY),
            id="a rule can try again what fails by default",
        ),
    ],
)
def test_the_jobs_own_rules(
    rules: list[Any], failure: str, exit_code: int | None, message: str, action: Action
) -> None:
    assert verdict(FailureClass(failure), exit_code=exit_code, message=message, rules=rules).action is action


def test_a_pattern_full_of_stars_is_no_way_to_keep_the_operator_busy() -> None:
    rule = {"messagePattern": "*a" * 127 + "b", "action": "Fail"}
    assert verdict(message="a" * MiB, rules=[rule]).action is Action.RETRY


def test_a_retry_is_counted_and_a_preemption_is_counted_apart() -> None:
    history = History(attempts(5), restarts=1, preemptions=7)
    retried = verdict(FailureClass.NODE_LOST, history=history)
    assert (retried.restarts, retried.preemptions) == (2, 7)
    preempted = verdict(FailureClass.PREEMPTED, history=history)
    assert (preempted.restarts, preempted.preemptions) == (1, 8)


def test_the_last_allowed_restart_is_taken_and_the_one_after_it_is_not() -> None:
    assert verdict(history=History(attempts(5), restarts=1), maxRestarts=2).action is Action.RETRY
    over = verdict(history=History(attempts(5), restarts=2), maxRestarts=2)
    assert (over.action, over.reason, over.restarts) == (Action.FAIL, "MaxRestartsExceeded", 2)
    assert "maxRestarts allows 2" in over.message


def test_preemptions_have_no_limit_unless_one_is_set() -> None:
    history = History(attempts(5), preemptions=1000)
    assert verdict(FailureClass.PREEMPTED, history=history).action is Action.RETRY_FREE
    over = verdict(FailureClass.PREEMPTED, history=history, maxPreemptions=1000)
    assert (over.action, over.reason) == (Action.FAIL, "MaxPreemptionsExceeded")


@pytest.mark.parametrize(
    ("restarts", "seconds"),
    [(0, 10), (1, 20), (2, 40), (5, 320), (6, 600), (900, 600)],
)
def test_the_wait_doubles_with_each_restart_up_to_its_limit(restarts: int, seconds: int) -> None:
    history = History(attempts(5), restarts=restarts)
    assert verdict(history=history, maxRestarts=1000).wait_seconds == seconds


def test_a_preempted_attempt_waits_the_first_wait_however_often_it_happens() -> None:
    history = History(attempts(5), restarts=3, preemptions=50)
    assert verdict(FailureClass.PREEMPTED, history=history).wait_seconds == 10


def test_out_of_memory_is_tried_again_with_half_the_micro_batch() -> None:
    history = History(attempts(0), micro_batch_size=8)
    smaller = verdict(FailureClass.OUT_OF_MEMORY, history=history)
    assert (smaller.action, smaller.restarts) == (Action.RETRY_WITH_SMALLER_MICRO_BATCH, 1)
    assert "micro-batch of at most 4" in smaller.message


def test_a_single_sequence_that_does_not_fit_fails_with_its_class() -> None:
    history = History(attempts(0), micro_batch_size=1)
    over = verdict(FailureClass.OUT_OF_MEMORY, history=history)
    assert (over.action, over.reason) == (Action.FAIL, "OutOfMemory")
    assert "single sequence" in over.message


@pytest.mark.parametrize(("size", "half"), [(8, 4), (7, 3), (3, 1), (2, 1), (1, None)])
def test_an_odd_micro_batch_is_halved_too(size: int, half: int | None) -> None:
    assert halved(size) == half


@pytest.mark.parametrize(
    ("steps", "is_over"),
    [
        pytest.param([100, 90, 100, 50], True, id="three that came no further than the one before them"),
        pytest.param([0, 0, 0, 0], True, id="none made a step"),
        pytest.param([0, 0, 0], False, id="the first has none before it"),
        pytest.param([100, 90, 101, 50], False, id="one came further"),
        pytest.param([100, 101, 101, 101], False, id="the first of the three came further"),
        pytest.param([100, 200, 150, 150, 150], True, id="progress long ago does not help"),
    ],
)
def test_three_attempts_in_a_row_without_progress_are_the_end(steps: list[int], is_over: bool) -> None:
    found = verdict(history=History(attempts(*steps)), maxRestarts=100)
    assert (found.reason == "NoProgress") is is_over


def test_preempted_attempts_say_nothing_about_progress() -> None:
    history = History(attempts(100, 0, 0, 0, 0, action=Action.RETRY_FREE), preemptions=4)
    assert verdict(history=history).action is Action.RETRY
    assert verdict(FailureClass.PREEMPTED, history=history).action is Action.RETRY_FREE


def saving(*attempts: tuple[int | None, int, int | None]) -> History:
    """Attempts of a job that saves: steps done when each began (None: it never trained), when it ended, and saved."""
    made = [
        Attempt(
            number=number,
            ray_job=f"j-{number}",
            created_at=NOON,
            resumed_from_step=begun,
            step=step,
            checkpoint_step=kept,
            action=Action.RETRY,
        )
        for number, (begun, step, kept) in enumerate(attempts, start=1)
    ]
    return History([*made[:-1], made[-1].model_copy(update={"action": None})], saves=True)


@pytest.mark.parametrize(
    ("attempts", "is_over"),
    [
        pytest.param(
            [(0, 410, 400), (400, 411, 400), (400, 412, 400), (400, 413, 400)],
            True,
            id="each came a step further, and nothing was saved",
        ),
        pytest.param([(0, 410, 400), (400, 411, 400), (400, 512, 500), (500, 513, 500)], False, id="one of them saved"),
        pytest.param(
            [(0, 410, 400), (400, 411, 400), (400, 412, 400), (420, 425, 420)],
            False,
            id="a later attempt began where no report had told of",
        ),
        pytest.param(
            [(0, 410, 400), (None, 0, None), (None, 0, None), (None, 0, None)], True, id="three that never trained"
        ),
        pytest.param(
            [(0, 410, 400), (200, 310, 300), (300, 410, 400), (200, 310, 300)],
            False,
            id="what was saved again after the newest was rejected is progress",
        ),
        pytest.param([(0, 9, None), (0, 9, None), (0, 9, None)], False, id="the first has none before it"),
        pytest.param([(0, 9, None), (0, 8, None), (0, 9, None), (0, 7, None)], True, id="none saved anything, ever"),
    ],
)
def test_where_a_job_saves_progress_is_what_the_next_attempt_need_not_do_again(
    attempts: list[tuple[int | None, int, int | None]], is_over: bool
) -> None:
    found = verdict(history=saving(*attempts), maxRestarts=100)
    assert (found.reason == "NoProgress") is is_over


def test_attempts_that_somebody_suspended_say_nothing_about_progress() -> None:
    history = History(attempts(100, 1, 1, 1, 1, action=None))
    assert verdict(history=history, maxRestarts=100).action is Action.RETRY


def test_a_hold_leaves_the_counts_alone_and_says_how_to_go_on() -> None:
    held = verdict(rules=[SUSPEND_ON_ALL], history=History(attempts(5), restarts=2, preemptions=1))
    assert (held.action, held.restarts, held.preemptions) == (Action.SUSPEND, 2, 1)
    assert "set suspend to true" in held.message
