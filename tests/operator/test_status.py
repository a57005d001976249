"""A job's status follows from what its run reported."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.failures import Failure, FailureClass, Problem
from finetune_api.job import Attempt, Phase, Status
from finetune_api.progress import Artifact, Outcome, Progress, Result, Stage
from finetune_operator.conditions import Finding, find
from finetune_operator.planning import plan_run
from finetune_operator.status import Draft, project, read_status
from tests.factories import job

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = NOON + timedelta(minutes=5)
ARTIFACT = Artifact(uri="file:///out", kind="adapter", digest="b3", bytes=10)


def progress(stage: Stage = Stage.TRAINING, **changes: Any) -> Progress:
    return Progress(**({"stage": stage, "updated_at": NOON} | changes))


def succeeded(**changes: Any) -> Outcome:
    return Outcome(**({"result": Result.SUCCEEDED, "step": 10, "total_steps": 10, "artifacts": [ARTIFACT]} | changes))


def failed(kind: FailureClass, **changes: Any) -> Outcome:
    failure = Failure(failure_class=kind, message="it broke", problems=[Problem(path="spec.x", message="mend it")])
    return Outcome(**({"result": Result.FAILED, "failure": failure, "step": 4} | changes))


def holds(status: Status) -> dict[str, tuple[str, str]]:
    return {condition.type: (condition.status, condition.reason) for condition in status.conditions}


@pytest.mark.parametrize(
    ("outcome", "report", "phase"),
    [
        pytest.param(None, None, Phase.PENDING, id="nothing reported yet"),
        pytest.param(None, progress(Stage.CHECKING_MODEL), Phase.STARTING, id="checking the model"),
        pytest.param(None, progress(Stage.LOADING_MODEL), Phase.STARTING, id="loading the model"),
        pytest.param(None, progress(Stage.TRAINING), Phase.RUNNING, id="training"),
        pytest.param(None, progress(Stage.EVALUATING), Phase.RUNNING, id="evaluating"),
        pytest.param(succeeded(), progress(Stage.DONE), Phase.SUCCEEDED, id="done"),
        pytest.param(failed(FailureClass.UNKNOWN), progress(), Phase.FAILED, id="failed while training"),
        pytest.param(Outcome(result=Result.CANCELLED), progress(), Phase.FAILED, id="stopped"),
    ],
)
def test_the_phase_is_the_state_in_a_word(outcome: Outcome | None, report: Progress | None, phase: Phase) -> None:
    assert project(outcome, report, NOON).phase is phase


def test_a_run_that_goes_on_is_neither_complete_nor_failed() -> None:
    assert holds(project(None, progress(), NOON)) == {
        "Valid": ("True", "Accepted"),
        "Running": ("True", "Training"),
        "ArtifactsPublished": ("False", "NotYet"),
    }


def test_success_is_complete_with_its_artifacts() -> None:
    status = project(succeeded(), progress(Stage.DONE), NOON)
    assert holds(status) == {
        "Valid": ("True", "Accepted"),
        "Running": ("False", "Succeeded"),
        "Complete": ("True", "Succeeded"),
        "ArtifactsPublished": ("True", "Written"),
    }
    assert status.artifacts == [ARTIFACT]


def test_early_stopping_is_a_success_with_a_reason_of_its_own() -> None:
    assert holds(project(succeeded(stopped_early=True), None, NOON))["Complete"] == ("True", "StoppedEarly")


@pytest.mark.parametrize("kind", list(FailureClass))
def test_a_failure_gives_its_class_as_the_reason(kind: FailureClass) -> None:
    status = project(failed(kind), progress(), NOON)
    assert holds(status)["Failed"] == ("True", kind.value)
    assert status.failure is kind
    assert holds(status)["ArtifactsPublished"] == ("False", "NoArtifact")
    message = find(status.conditions, "Failed")
    assert message is not None
    assert message.message == "it broke\nspec.x: mend it"


@pytest.mark.parametrize("kind", list(FailureClass))
def test_only_the_jobs_own_faults_make_it_invalid(kind: FailureClass) -> None:
    expected = "False" if kind in (FailureClass.USER_ERROR, FailureClass.DATA_ERROR) else "True"
    assert holds(project(failed(kind), None, NOON))["Valid"][0] == expected


def test_a_stopped_run_is_failed_as_cancelled_and_has_no_failure_class() -> None:
    status = project(Outcome(result=Result.CANCELLED, step=3), progress(), NOON)
    assert holds(status)["Failed"] == ("True", "Cancelled")
    assert status.failure is None


def test_a_condition_that_did_not_change_keeps_its_time() -> None:
    before = project(None, progress(Stage.TRAINING), NOON)
    after = project(None, progress(Stage.EVALUATING), LATER, previous=before)
    running = find(after.conditions, "Running")
    assert running is not None
    assert (running.reason, running.last_transition_time) == ("Evaluating", NOON)


def test_a_condition_that_changed_has_the_time_of_the_change() -> None:
    before = project(None, progress(), NOON)
    running = find(project(succeeded(), progress(), LATER, previous=before).conditions, "Running")
    assert running is not None
    assert running.last_transition_time == LATER


def test_the_status_names_the_generation_that_it_is_about() -> None:
    status = project(None, None, NOON, generation=7)
    assert status.observed_generation == 7
    assert {condition.observed_generation for condition in status.conditions} == {7}


def test_progress_is_in_whole_numbers_and_figures_are_text() -> None:
    report = progress(
        step=33,
        total_steps=100,
        epoch=1.237,
        eta_seconds=10.2,
        tokens_per_second=99.6,
        metrics={"loss": 1.23456789, "learning_rate": 0.0002},
    )
    shown = project(None, report, NOON).progress
    assert shown is not None
    assert (shown.step, shown.percent, shown.epoch) == (33, 33, "1.24")
    assert (shown.eta_seconds, shown.tokens_per_second) == (11, 100)
    assert shown.metrics == {"loss": "1.23457", "learning_rate": "0.0002"}


def test_percent_is_rounded_down_so_that_100_means_done() -> None:
    shown = project(None, progress(step=999, total_steps=1000), NOON).progress
    assert shown is not None
    assert shown.percent == 99


def test_the_outcome_has_the_last_word_and_no_time_is_left() -> None:
    report = progress(step=9, total_steps=10, eta_seconds=5.0, metrics={"loss": 2.0, "grad_norm": 1.0})
    shown = project(succeeded(metrics={"loss": 1.5}), report, NOON).progress
    assert shown is not None
    assert (shown.step, shown.percent, shown.eta_seconds) == (10, 100, None)
    assert shown.metrics == {"loss": "1.5", "grad_norm": "1"}


def test_more_figures_than_a_status_may_hold_are_cut() -> None:
    shown = project(None, progress(metrics={f"m{i}": float(i) for i in range(20)}), NOON).progress
    assert shown is not None
    assert len(shown.metrics) == 16


def test_of_many_figures_those_stay_that_tell_how_training_goes() -> None:
    """PPO's with several rewards, in the order in which a run first has them."""
    told = ["loss", "learning_rate", "num_tokens", "reward", "reward_std", "response_length", "cut_off"]
    told += [*(f"reward/{name}" for name in "abcdefgh"), *(f"reward_errors/{name}" for name in "abcdefgh"), "kl"]
    told += ["values", "explained_variance", "clip_fraction", "approx_kl", "entropy", "value_loss", "policy_loss"]
    told += ["seconds/train", "grad_norm", "eval_loss", "eval_reward", "eval_reward/a"]
    shown = project(None, progress(metrics=dict.fromkeys(told, 1.0)), NOON).progress
    assert shown is not None
    important = {"loss", "eval_loss", "reward", "eval_reward", "kl", "approx_kl", "clip_fraction", "entropy"}
    important |= {"value_loss", "policy_loss", "explained_variance", "learning_rate", "grad_norm"}
    assert important < shown.metrics.keys()
    assert shown.metrics.keys() - important == {f"reward_errors/{name}" for name in "abc"}


def test_the_status_names_the_method_and_the_tuning_of_the_plan() -> None:
    status = project(None, None, NOON, plan=plan_run(job()))
    assert (status.method, status.tuning) == ("sft", "lora")


# The status that stands in an object


def standing(**changes: Any) -> dict[str, Any]:
    attempt = {"number": 1, "rayJob": "example-1", "createdAt": "2026-01-01T12:00:00Z"}
    return {"phase": "Running", "rayJob": "example-1", "restarts": 2, "attempts": [attempt]} | changes


@pytest.mark.parametrize("document", [None, {}, [], "status", 7])
def test_what_is_no_status_is_none(document: Any) -> None:
    assert read_status(document) is None


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"addedLater": {"a": 1}}, id="a field of a newer version"),
        pytest.param({"progress": {"step": "far", "metrics": {"loss": 1}}}, id="progress that is none"),
        pytest.param({"conditions": "none"}, id="conditions that are no list"),
        pytest.param(
            {"conditions": [{"type": "Valid"}, 7, {"type": "x", "status": "Maybe"}]}, id="conditions that are none"
        ),
        pytest.param({"phase": "Dancing"}, id="a phase that there is not"),
        pytest.param({"finishedAt": "yesterday"}, id="a time that is none"),
        pytest.param({"checkpoint": {"step": 5}}, id="half a checkpoint"),
        pytest.param({"failure": "Boredom", "postMortem": {"attempt": 1}}, id="a failure that there is not"),
    ],
)
def test_what_cannot_be_read_costs_nothing_else(changes: dict[str, Any]) -> None:
    status = read_status(standing(**changes))
    assert status is not None
    assert (status.restarts, [attempt.number for attempt in status.attempts]) == (2, [1])
    assert status.finished_at is None


def test_an_attempt_that_cannot_be_read_leaves_the_others() -> None:
    good = standing()["attempts"][0]
    listed = [{"number": "one"}, good, {**good, "number": 2, "outcome": 7, "extra": 1}, 5]
    status = read_status(standing(attempts=listed))
    assert status is not None
    assert [attempt.number for attempt in status.attempts] == [1, 2]


@pytest.mark.parametrize(
    "time", ["2026-01-01T12:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "2026-01-01T12:00:00Z"]
)
def test_every_time_can_be_compared_with_now(time: str) -> None:
    attempt = standing()["attempts"][0] | {"createdAt": time, "endedAt": time, "stopAskedAt": time}
    saved = {"uri": "file:///c", "step": 1, "savedAt": time, "worldSize": 1, "bytes": 1}
    condition = {"type": "Valid", "status": "True", "reason": "R", "lastTransitionTime": time}
    changes = {"attempts": [attempt], "conditions": [condition], "finishedAt": time, "progress": {"updatedAt": time}}
    status = read_status(standing(**changes, checkpoint=saved))
    assert status is not None
    assert status.progress is not None
    assert status.checkpoint is not None
    moments = [status.finished_at, status.progress.updated_at, status.attempts[0].ended_at]
    moments += [status.checkpoint.saved_at, status.attempts[0].stop_asked_at]
    moments += [status.attempts[0].created_at, status.conditions[0].last_transition_time]
    for moment in moments:
        assert moment is not None
        assert abs((moment - NOON).days) < 100_000


# The draft of the next


def written(draft: Draft) -> Status:
    status = draft.to_status()
    assert status is not None
    return status


def test_a_draft_that_nothing_happened_to_is_what_stands() -> None:
    assert Draft(read_status(standing(observedGeneration=3)), LATER, 3).to_status() is None


def test_attempts_are_in_order_and_each_is_there_once() -> None:
    good = standing()["attempts"][0]
    status = read_status(standing(attempts=[{**good, "number": number} for number in (3, 1, 3, 2)]))
    assert [attempt.number for attempt in Draft(status, NOON, 1).attempts] == [1, 2, 3]


def test_only_the_last_ten_attempts_are_written() -> None:
    draft = Draft(None, NOON, 1)
    for number in range(1, 15):
        draft.add(Attempt(number=number, ray_job=f"j-{number}", created_at=NOON, ended_at=NOON))
    assert [attempt.number for attempt in written(draft).attempts] == list(range(5, 15))


def test_counts_that_somebody_made_negative_begin_at_nothing() -> None:
    status = written(Draft(read_status(standing(restarts=-3, preemptions=-1, activeSeconds=-9)), NOON, 1))
    assert (status.restarts, status.preemptions, status.active_seconds) == (0, 0, 0)


def test_a_job_whose_condition_says_that_it_ended_has_ended() -> None:
    condition = {"type": "Failed", "status": "True", "reason": "R", "lastTransitionTime": "2026-01-01T12:00:00Z"}
    assert Draft(read_status(standing(conditions=[condition])), LATER, 1).finished_at == NOON


def test_a_condition_of_which_nothing_was_said_stays_as_it_was() -> None:
    first = Draft(None, NOON, 1)
    first.find(Finding("Valid", "True", "Accepted", "yes"))
    second = Draft(written(first), LATER, 2)
    second.find(Finding("Admitted", "True", "Admitted", "yes"))
    valid, admitted = written(second).conditions
    assert (valid.last_transition_time, valid.observed_generation) == (NOON, 1)
    assert (admitted.last_transition_time, admitted.observed_generation) == (LATER, 2)


def test_conditions_stand_in_the_order_of_a_jobs_life() -> None:
    draft = Draft(None, NOON, 1)
    for name in ("Failed", "Running", "Custom", "Valid"):
        draft.find(Finding(name, "True", "R", ""))
    assert [condition.type for condition in written(draft).conditions] == ["Valid", "Running", "Failed", "Custom"]


def test_a_message_that_is_too_long_for_a_condition_is_cut() -> None:
    draft = Draft(None, NOON, 1)
    draft.find(Finding("Valid", "False", "R", "x" * 5000))
    assert len(written(draft).conditions[0].message) == 4096
