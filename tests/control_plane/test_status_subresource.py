"""What the operator writes into status is what readers get, and nobody else's write touches it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.failures import Failure, FailureClass, Problem
from finetune_api.job import Status
from finetune_api.progress import Artifact, EvalSummary, Outcome, Progress, Result, Stage
from finetune_operator.status import project
from tests.cluster.client import ApiError, Client
from tests.control_plane.conftest import JOBS, Store
from tests.factories import job_document

pytestmark = pytest.mark.control_plane


NOON = datetime(2025, 6, 1, 12, 0, 0, 250_000, tzinfo=UTC)
REPORT = Progress(
    stage=Stage.TRAINING,
    step=120,
    total_steps=400,
    epoch=0.6,
    percent=30,
    eta_seconds=88.2,
    tokens_per_second=5321.7,
    metrics={f"figure_{number}": number / 3 for number in range(20)} | {"loss": 1.0},
    message="Step 120 of 400",
    updated_at=NOON,
)
SUCCESS = Outcome(
    result=Result.SUCCEEDED,
    step=400,
    total_steps=400,
    eval=EvalSummary(loss_before=2.5, loss_after=1.5),
    artifacts=[Artifact(uri="file:///models/out", kind="adapter", digest="00ff", bytes=3 * 2**31)],
    metrics={"eval_loss": 1.5},
)
FAILURE = Outcome(
    result=Result.FAILED,
    failure=Failure(
        failure_class=FailureClass.DATA_ERROR,
        message="Two rows cannot be read.",
        problems=[Problem(file="rows.jsonl:17", value='"x"', message="must be a mapping")] * 100,
        step=0,
    ),
)

STATUSES = {
    "before the first report": project(None, None, NOON, generation=1),
    "while training": project(None, REPORT, NOON, generation=1),
    "after success": project(SUCCESS, REPORT, NOON + timedelta(hours=1), project(None, REPORT, NOON), generation=1),
    "after a failure with many problems": project(FAILURE, None, NOON, generation=1),
}


@pytest.mark.parametrize("status", STATUSES.values(), ids=STATUSES)
def test_a_status_reads_back_as_it_was_written(api: Client, stored_job: Store, status: Status) -> None:
    stored = stored_job(job_document(name="reads-back"))
    api.replace(f"{JOBS}/reads-back/status?fieldValidation=Strict", stored | {"status": status.to_document()})
    read = api.get(f"{JOBS}/reads-back")["status"]
    assert read == status.to_document()
    assert Status.model_validate(read) == status


def test_a_write_of_the_job_leaves_the_status_alone(api: Client, stored_job: Store) -> None:
    stored = stored_job(job_document(name="job-write"))
    status = STATUSES["while training"].to_document()
    with_status = api.replace(f"{JOBS}/job-write/status", stored | {"status": status})
    with_status["spec"]["suspend"] = True
    written = api.replace(f"{JOBS}/job-write", with_status | {"status": {"phase": "Failed"}})
    assert written["spec"]["suspend"]
    assert written["status"] == status


def test_a_write_of_the_status_leaves_the_spec_and_its_generation_alone(api: Client, stored_job: Store) -> None:
    stored = stored_job(job_document(name="status-write"))
    changed = stored | {"spec": job_document({"training.epochs": 9})["spec"], "status": {"phase": "Running"}}
    written = api.replace(f"{JOBS}/status-write/status", changed)
    assert written["spec"] == stored["spec"]
    assert written["metadata"]["generation"] == 1


def test_a_job_cannot_be_created_with_a_status(api: Client, stored_job: Store) -> None:
    stored = stored_job(job_document(name="no-status") | {"status": {"phase": "Succeeded"}})
    assert "status" not in stored


def test_a_status_outside_the_contract_is_refused(api: Client, stored_job: Store) -> None:
    stored = stored_job(job_document(name="bad-status"))
    with pytest.raises(ApiError, match=r"status\.restarts"):
        api.replace(f"{JOBS}/bad-status/status", stored | {"status": {"restarts": "many"}})


def test_words_that_only_a_newer_operator_knows_are_taken(api: Client, stored_job: Store) -> None:
    stored = stored_job(job_document(name="newer-status"))
    status = {"phase": "Dancing", "failure": "Dizzy"}
    written = api.replace(f"{JOBS}/newer-status/status", stored | {"status": status})["status"]
    assert (written["phase"], written["failure"]) == ("Dancing", "Dizzy")
