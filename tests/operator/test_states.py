"""What KubeRay, the kubelet and the trainers wrote is read into types, and no document makes that fail."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.failures import Failure, FailureClass
from finetune_api.progress import Artifact, Outcome, Progress, Result, Stage
from finetune_operator import names
from finetune_operator.states import (
    ATTEMPT_KEY,
    OUTCOME_ATTEMPT_KEY,
    OUTCOME_KEY,
    PROGRESS_KEY,
    Report,
    project_pod,
    read_pod,
    read_ray_job,
    read_report,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
PROGRESS = Progress(stage=Stage.TRAINING, step=3, total_steps=10, updated_at=NOON)
OUTCOME = Outcome(result=Result.FAILED, failure=Failure(failure_class=FailureClass.DATA_ERROR, message="no rows"))

KEYS = [
    "metadata", "spec", "status", "name", "uid", "labels", "ownerReferences", "controller", "creationTimestamp",
    "deletionTimestamp", "suspend", "jobDeploymentStatus", "jobStatus", "reason", "message", "startTime", "endTime",
    "phase", "nodeName", "conditions", "type", "containerStatuses", "initContainerStatuses", "state", "lastState",
    "waiting", "terminated", "exitCode", "volumes", "secret", "secretName", "rayClusterStatus", "data", ATTEMPT_KEY,
    PROGRESS_KEY, OUTCOME_KEY, names.ATTEMPT_LABEL,
]  # fmt: skip
VALUES = [
    "True", "False", "Ready", "PodScheduled", "DisruptionTarget", "ReplicaFailure", "Failed", "9999", "1",
    "2026-01-01T12:00:00Z",
    "0001-01-01T00:00:00+14:00", "ray", "{}", "[" * 9999, '{"stage": "Training", "updatedAt": "2026-01-01T12:00:00"}',
]  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(VALUES)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=40,
)


def ray_job(spec: Any = None, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "bot-2",
            "uid": "u2",
            "creationTimestamp": "2026-01-01T12:00:00Z",
            "labels": names.attempt_labels("bot", 2),
            "ownerReferences": [{"uid": "other"}, {"uid": "u", "controller": True}],
        },
        "spec": spec or {},
        "status": status,
    }


def pod(*containers: dict[str, Any], init: Any = (), conditions: Any = (), **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "bot-2-head", "labels": names.pod_labels("bot", 2, names.HEAD)},
        "spec": {"nodeName": "node-1", "containers": [{"name": "ray", "image": "x"}]},
        "status": {
            "phase": "Running",
            "containerStatuses": list(containers),
            "initContainerStatuses": list(init),
            "conditions": list(conditions),
        }
        | status,
    }


def ended(code: int, reason: str = "Error", name: str = "ray", when: str = "state") -> dict[str, Any]:
    return {"name": name, when: {"terminated": {"exitCode": code, "reason": reason}}}


def waiting(reason: str, name: str = "ray") -> dict[str, Any]:
    return {"name": name, "state": {"waiting": {"reason": reason}}}


def report(**data: Any) -> dict[str, Any]:
    return {"data": data}


@given(ANYTHING)
def test_no_document_makes_reading_fail(document: Any) -> None:
    read_ray_job(document)
    read_pod(document)
    read_report(document)


@given(ANYTHING)
def test_a_projected_pod_reads_like_the_whole_one(document: Any) -> None:
    assert read_pod(project_pod(document)) == read_pod(document)


def test_a_ray_job_is_read_with_its_attempt_its_owner_and_its_times() -> None:
    state = read_ray_job(ray_job(startTime="2026-01-01T12:00:00Z", endTime="2026-01-01T13:00:00+01:00"))
    assert (state.name, state.uid, state.owner_uid, state.attempt) == ("bot-2", "u2", "u", 2)
    assert (state.created_at, state.started_at, state.ended_at) == (NOON, NOON, NOON)
    assert not any((state.suspended, state.deleting, state.finished, state.running))


def test_a_time_without_a_zone_is_utc_so_that_it_can_be_compared() -> None:
    assert read_ray_job(ray_job(startTime="2026-01-01T12:00:00")).started_at == NOON


@pytest.mark.parametrize(
    ("deployment", "job", "finished", "succeeded", "running"),
    [
        pytest.param("", "", False, False, False, id="a new one"),
        pytest.param("Initializing", "", False, False, False, id="the cluster is being made"),
        pytest.param("Running", "PENDING", False, False, True, id="handed over"),
        pytest.param("Running", "RUNNING", False, False, True, id="training"),
        pytest.param("Running", "SUCCEEDED", True, True, False, id="the job has ended and KubeRay does not say so yet"),
        pytest.param("Complete", "SUCCEEDED", True, True, False, id="done"),
        pytest.param("Complete", "STOPPED", True, False, False, id="complete because it was stopped"),
        pytest.param("Failed", "FAILED", True, False, False, id="the entrypoint failed"),
        pytest.param("Failed", "", True, False, False, id="it never got to the entrypoint"),
        pytest.param("ValidationFailed", "", True, False, False, id="KubeRay refused it"),
        pytest.param("Suspended", "", False, False, False, id="suspended by a queue"),
    ],
)
def test_two_words_of_kuberay_tell_how_far_it_is(
    deployment: str, job: str, finished: bool, succeeded: bool, running: bool
) -> None:
    state = read_ray_job(ray_job(jobDeploymentStatus=deployment, jobStatus=job))
    assert (state.finished, state.succeeded, state.running) == (finished, succeeded, running)


def test_only_true_suspends() -> None:
    assert read_ray_job(ray_job({"suspend": True})).suspended
    assert not read_ray_job(ray_job({"suspend": "yes"})).suspended


def test_a_pod_is_read_with_its_role_and_node() -> None:
    state = read_pod(pod(conditions=[{"type": "Ready", "status": "True"}]))
    assert (state.name, state.attempt, state.role, state.node) == ("bot-2-head", 2, names.HEAD, "node-1")
    assert state.ready
    assert not any((state.failed, state.deleting))


@pytest.mark.parametrize(
    ("containers", "init", "told"),
    [
        pytest.param([ended(0, "Completed"), ended(3, name="sidecar")], [], (3, "Error"), id="the one that failed"),
        pytest.param(
            [ended(1, name="sidecar"), ended(137, "OOMKilled")], [], (137, "OOMKilled"), id="Ray's before another's"
        ),
        pytest.param([ended(137, "OOMKilled", when="lastState")], [], (137, "OOMKilled"), id="before it came back"),
        pytest.param([waiting("PodInitializing")], [ended(1, name="wait")], (1, "Error"), id="one that ran before"),
        pytest.param([ended(0, "Completed")], [], (0, "Completed"), id="one that ended well"),
        pytest.param([], [ended(0, "Completed", name="wait")], (None, None), id="one that only had to end"),
    ],
)
def test_the_end_of_the_container_that_tells_most(containers: Any, init: Any, told: tuple[int, str]) -> None:
    state = read_pod(pod(*containers, init=init))
    assert (state.exit_code, state.terminated_reason) == told


def test_trouble_is_told_before_an_ordinary_wait() -> None:
    assert read_pod(pod(waiting("ContainerCreating"), waiting("ErrImagePull", "x"))).waiting_reason == "ErrImagePull"
    assert read_pod(pod(waiting("ContainerCreating"))).waiting_reason == "ContainerCreating"
    assert read_pod(pod()).waiting_reason is None
    found = {"waiting": {"reason": "ErrImagePull", "message": "no such image: registry/x"}}
    assert read_pod(pod({"name": "ray", "state": found})).waiting_message == "no such image: registry/x"


def test_a_pod_tells_who_takes_it_away_and_why_no_node_takes_it() -> None:
    conditions = [
        {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"},
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"},
    ]
    state = read_pod(pod(conditions=conditions))
    assert (state.disruption, state.unschedulable) == ("PreemptionByScheduler", "0/3 nodes")
    over = [{"type": "DisruptionTarget", "status": "False", "reason": "PreemptionByScheduler"}]
    assert read_pod(pod(conditions=over)).disruption is None


def test_a_projected_pod_has_lost_what_nobody_reads() -> None:
    whole = pod(ended(1) | {"imageID": "sha"}, conditions=[{"type": "Initialized", "status": "True"}])
    whole["metadata"]["managedFields"] = [{}]
    kept = project_pod(whole)
    assert "managedFields" not in kept["metadata"]
    assert kept["spec"] == {"nodeName": "node-1"}
    assert kept["status"]["conditions"] == []
    assert "imageID" not in kept["status"]["containerStatuses"][0]


def test_a_report_is_read_with_its_attempt() -> None:
    written = report(
        **{
            ATTEMPT_KEY: "2",
            PROGRESS_KEY: PROGRESS.model_dump_json(by_alias=True),
            OUTCOME_KEY: OUTCOME.model_dump_json(by_alias=True),
        }
    )
    assert read_report(written) == Report(2, PROGRESS, OUTCOME)


@pytest.mark.parametrize(("about", "kept"), [("2", True), ("1", False)])
def test_an_outcome_of_the_attempt_before_is_not_taken_for_this_ones(about: str, kept: bool) -> None:
    said = {ATTEMPT_KEY: "2", OUTCOME_ATTEMPT_KEY: about, OUTCOME_KEY: OUTCOME.model_dump_json(by_alias=True)}
    assert read_report(report(**said)) == Report(2, None, OUTCOME if kept else None)


@pytest.mark.parametrize("config_map", [None, {}, {"data": None}, report(), report(**{PROGRESS_KEY: "{"})])
def test_a_report_that_is_not_there_or_not_json_is_empty(config_map: Any) -> None:
    assert read_report(config_map) == Report()


def test_a_half_that_was_spoilt_by_hand_takes_nothing_from_the_other() -> None:
    good = PROGRESS.model_dump_json(by_alias=True)
    assert read_report(report(**{PROGRESS_KEY: good, OUTCOME_KEY: '{"result": "Great"}'})) == Report(None, PROGRESS)


@pytest.mark.parametrize("step", [-1, 1 << 60])
def test_numbers_beyond_belief_are_not_taken_over_into_a_status(step: int) -> None:
    progress, outcome = PROGRESS.model_copy(update={"step": step}), OUTCOME.model_copy(update={"step": step})
    assert read_report(report(**{PROGRESS_KEY: progress.model_dump_json(by_alias=True)})).progress is None
    assert read_report(report(**{OUTCOME_KEY: outcome.model_dump_json(by_alias=True)})).outcome is None


def test_an_artifact_of_impossible_size_spoils_the_outcome() -> None:
    huge = Outcome(result=Result.SUCCEEDED, artifacts=[Artifact(uri="x", kind="model", digest="d", bytes=1 << 60)])
    assert read_report(report(**{OUTCOME_KEY: huge.model_dump_json(by_alias=True)})).outcome is None


def test_a_report_whose_time_has_no_zone_can_be_compared() -> None:
    naive = PROGRESS.model_copy(update={"updated_at": NOON.replace(tzinfo=None)})
    read = read_report(report(**{PROGRESS_KEY: naive.model_dump_json(by_alias=True)})).progress
    assert read is not None
    assert read.updated_at == NOON
