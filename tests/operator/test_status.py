"""A job's status follows from what its run reported."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.failures import Failure, FailureClass, Problem
from finetune_api.job import Phase, Status
from finetune_api.progress import Artifact, Outcome, Progress, Result, Stage
from finetune_operator.conditions import find
from finetune_operator.planning import plan_run
from finetune_operator.status import project
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


def test_the_status_names_the_method_and_the_tuning_of_the_plan() -> None:
    status = project(None, None, NOON, plan=plan_run(job()))
    assert (status.method, status.tuning) == ("sft", "lora")
