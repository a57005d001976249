"""Lives of jobs under the real operator and a real API server; the test is KubeRay and the trainers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.faults import Faults
from tests.control_plane.operators import Jobs, Operator, operator

pytestmark = pytest.mark.control_plane


@pytest.fixture
def running(jobs: Jobs, faults: Faults, tmp_path: Path) -> Iterator[Operator]:
    """An operator behind the proxy, which counts what it asks."""
    with operator(tmp_path, faults.kubeconfig, jobs.namespace) as one:
        yield one


def test_a_job_becomes_a_ray_job_and_its_end_the_jobs(jobs: Jobs, running: Operator) -> None:
    jobs.submit("tiny")
    running.wait(jobs.has("tiny-1"), "its RayJob")
    running.wait(lambda: jobs.knows_its_ray_job("tiny"), "the attempt to know its RayJob")
    assert sorted(jobs.children()) == [
        "configmaps/tiny-1-plan",
        "configmaps/tiny-progress",
        "networkpolicies/tiny",
        "poddisruptionbudgets/tiny",
        "rayjobs/tiny-1",
        "rolebindings/tiny-trainer",
        "roles/tiny-trainer",
        "serviceaccounts/tiny-trainer",
    ]
    assert jobs.condition("tiny", "Valid") == ("True", "Accepted")
    jobs.run("tiny")
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    jobs.succeed("tiny")
    running.wait(jobs.is_at("tiny", "Succeeded"), "the job to have succeeded")
    assert jobs.attempts("tiny") == [(1, "Succeeded")]
    assert jobs.status("tiny")["artifacts"][0]["uri"] == "s3://models/tiny"
    running.wait(lambda: {"AttemptStarted", "Complete"} <= set(jobs.events("tiny")), "events that tell of it")
    assert running.metric("finetune_attempts_total", outcome="Succeeded") == 1
    running.wait(lambda: running.metric("finetune_jobs", phase="Succeeded") == 1, "the watch to bring what was written")
    assert {line["job"] for line in running.log() if "created" in line["message"]} == {"tiny"}
    assert "OutdatedCRD" not in jobs.events("tiny")  # the server keeps every field that was written


def test_a_failed_attempt_is_followed_by_another_and_a_users_mistake_by_none(jobs: Jobs, running: Operator) -> None:
    backoff = {"failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}}
    jobs.submit("again", backoff)
    jobs.submit("mistake", backoff)
    running.wait(jobs.has("again-1", "mistake-1"), "both RayJobs")
    jobs.fail("again")
    jobs.fail("mistake", exit_code=2)
    running.wait(jobs.has("again-2", "mistake-1"), "the second attempt")
    running.wait(jobs.is_at("mistake", "Failed"), "the mistake to be told")
    assert jobs.condition("mistake", "Failed") == ("True", "UserError")
    jobs.run("again", 2)
    jobs.succeed("again", 2)
    running.wait(jobs.is_at("again", "Succeeded"), "the other to succeed")
    assert jobs.attempts("again") == [(1, "StorageError"), (2, "Succeeded")]
    assert jobs.status("again")["restarts"] == 1
    assert jobs.config_maps() == {"again-2-plan", "again-progress", "mistake-1-plan", "mistake-progress"}


def test_a_job_is_suspended_and_resumed(jobs: Jobs, running: Operator) -> None:
    jobs.submit("tiny")
    running.wait(jobs.has("tiny-1"), "its RayJob")
    jobs.run("tiny")
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    jobs.change("tiny", {"spec": {"suspend": True}})
    running.wait(jobs.is_at("tiny", "Suspended"), "the job to be suspended")
    running.wait(jobs.has(), "its RayJob to be gone")
    jobs.change("tiny", {"spec": {"suspend": False}})
    running.wait(lambda: jobs.attempts("tiny") == [(1, "Suspended"), (2, None)], "the next attempt")
    assert jobs.has("tiny-2")()
    assert jobs.status("tiny")["restarts"] == 0


def test_a_job_waits_for_its_runtime(jobs: Jobs, running: Operator) -> None:
    pool = f"pool-{secrets.token_hex(4)}"
    jobs.submit("early", {"runtimeRef": {"name": pool}})
    running.wait(lambda: jobs.condition("early", "Valid") == ("False", "RuntimeNotFound"), "the job to say so")
    jobs.submit_runtime(pool)
    running.wait(lambda: jobs.condition("early", "Valid") == ("True", "Accepted"), "the job to be accepted")
    assert jobs.has("early-1")()
    jobs.api.delete(f"/apis/finetune-operator.io/v1alpha1/finetuneruntimes/{pool}")
    jobs.run("early")
    jobs.succeed("early")
    running.wait(jobs.is_at("early", "Succeeded"), "the job to end well without it")


def test_a_ray_job_deleted_by_hand_is_an_attempt_that_failed(jobs: Jobs, running: Operator) -> None:
    jobs.submit("tiny", {"failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}})
    running.wait(jobs.has("tiny-1"), "its RayJob")
    jobs.run("tiny")
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    jobs.delete_ray_job("tiny-1")
    running.wait(lambda: jobs.attempts("tiny") == [(1, "Unknown"), (2, None)], "the next attempt")
    assert jobs.has("tiny-2")()
    assert "deleted" in jobs.status("tiny")["attempts"][0]["message"]


def test_config_maps_that_people_edit_or_delete_do_no_harm(jobs: Jobs, running: Operator) -> None:
    jobs.submit("tiny")
    running.wait(jobs.has("tiny-1"), "its RayJob")
    jobs.run("tiny")
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    for text in ("", "{", "[]", '{"stage": "Flying"}', '{"stage": "Training", "step": 1e400}', "\x00"):
        jobs.edit_config_map("tiny-progress", {"progress.json": text, "outcome.json": text, "attempt": "one"})
    jobs.delete_config_map("tiny-1-plan")
    running.wait(lambda: "tiny-1-plan" in jobs.config_maps(), "the plan to be there again")
    jobs.delete_config_map("tiny-progress")
    running.wait(lambda: "tiny-progress" in jobs.config_maps(), "the place for progress to be there again")
    jobs.succeed("tiny")
    running.wait(jobs.is_at("tiny", "Succeeded"), "the job to succeed all the same")


def test_an_object_of_somebody_else_is_left_alone_and_the_job_says_whose_name_it_needs(
    jobs: Jobs, running: Operator
) -> None:
    path = f"/api/v1/namespaces/{jobs.namespace}/serviceaccounts"
    theirs = jobs.api.create(path, {"metadata": {"name": "tiny-trainer"}})
    jobs.submit("tiny")
    running.wait(lambda: jobs.condition("tiny", "ClusterReady") == ("False", "NameTaken"), "the job to say so")
    jobs.submit("other")
    running.wait(jobs.has("other-1"), "another job to start")
    assert jobs.api.get(f"{path}/tiny-trainer")["metadata"]["uid"] == theirs["metadata"]["uid"]
    jobs.api.delete(f"{path}/tiny-trainer")
    jobs.change("tiny", {"metadata": {"annotations": {"look": "again"}}})
    running.wait(jobs.has("other-1", "tiny-1"), "the job to start")


def test_a_job_that_breaks_the_rules_keeps_nobody_from_running(jobs: Jobs, running: Operator) -> None:
    # What the schema cannot know: two workers share a batch of one.
    wrong = {"training.globalBatchSize": 1, "cluster.workers.replicas": 2}
    jobs.submit("wrong", wrong)
    running.wait(lambda: jobs.condition("wrong", "Valid")[0] == "False", "the mistake to be told")
    jobs.submit("right")
    running.wait(jobs.has("right-1"), "the other job to start")
    assert "globalBatchSize" in str(jobs.status("wrong")["conditions"])


def test_a_job_that_looked_at_again_has_nothing_new_writes_nothing(
    jobs: Jobs, running: Operator, faults: Faults
) -> None:
    pool = f"pool-{secrets.token_hex(4)}"
    names = ["running", "ended", "waits", "wrong"]
    jobs.submit("running")
    jobs.submit("ended")
    jobs.submit("waits", {"runtimeRef": {"name": pool}})
    jobs.submit("wrong", {"training.globalBatchSize": 1, "cluster.workers.replicas": 2})
    running.wait(jobs.has("running-1", "ended-1"), "both RayJobs")
    jobs.run("running")
    jobs.succeed("ended")
    running.wait(jobs.is_at("running", "Running"), "one to run")
    running.wait(jobs.is_at("ended", "Succeeded"), "one to end")
    running.wait(lambda: jobs.condition("wrong", "Valid")[0] == "False", "one to be wrong")
    running.wait(lambda: jobs.condition("waits", "Valid")[0] == "False", "one to wait")
    _look_again(jobs, running, names, "first")
    faults.forget()
    _look_again(jobs, running, names, "second")
    assert faults.writes(but=("leases",)) == []


def _look_again(jobs: Jobs, running: Operator, names: list[str], why: str) -> None:
    before = running.metric("controller_runtime_reconcile_total")
    for name in names:
        jobs.change(name, {"metadata": {"annotations": {"look-again": why}}})
    running.wait(
        lambda: running.metric("controller_runtime_reconcile_total") >= before + len(names), "a pass over each job"
    )
    # Some of these may be echoes of what was written before, while another pass still tells the Event of it.
    running.wait(lambda: running.idle, "every pass to end")


def test_a_deleted_job_leaves_nothing(jobs: Jobs, running: Operator) -> None:
    jobs.submit("tiny")
    running.wait(jobs.has("tiny-1"), "its RayJob")
    jobs.run("tiny")
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    jobs.delete("tiny")
    running.wait(lambda: jobs.children() == [], "everything to be gone")


def test_a_job_is_created_again_under_its_name_while_the_old_one_is_still_being_cleared_away(
    jobs: Jobs, running: Operator
) -> None:
    jobs.submit("tiny")
    running.wait(jobs.has("tiny-1"), "its RayJob")
    before = jobs.ray_jobs()["tiny-1"]
    jobs.delete("tiny")
    jobs.submit("tiny")
    running.wait(lambda: jobs.ray_jobs().get("tiny-1") not in (None, before), "a RayJob of its own")
    running.wait(lambda: jobs.knows_its_ray_job("tiny"), "the attempt to know it")
