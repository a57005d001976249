"""A job's life, as scenarios: something happens, and then the world is so."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.progress import Stage
from finetune_operator import launch
from finetune_operator.decide import Decision, decide
from finetune_operator.kinds import (
    CONFIG_MAP,
    FINETUNE_JOB,
    NETWORK_POLICY,
    POD_DISRUPTION_BUDGET,
    RAY_JOB,
    ROLE,
    ROLE_BINDING,
    SERVICE_ACCOUNT,
)
from finetune_operator.observe import World, observe
from tests.factories import job_document
from tests.operator.decide_factories import (
    NOON,
    SETTINGS,
    Cluster,
    another_job,
    break_attempt,
    failed,
    started,
    stopped,
    succeeded,
)

GONE = Decision()


# A job's first attempt


def test_a_new_job_gets_all_its_objects_and_its_status_in_one_pass() -> None:
    cluster = Cluster()
    cluster.step()
    assert cluster.named(RAY_JOB) == ["example-1"]
    assert cluster.named(CONFIG_MAP) == ["example-1-plan", "example-progress"]
    for kind in (SERVICE_ACCOUNT, ROLE, ROLE_BINDING):
        assert cluster.named(kind) == ["example-trainer"]
    for kind in (NETWORK_POLICY, POD_DISRUPTION_BUDGET):
        assert cluster.named(kind) == ["example"]
    assert (cluster.status["phase"], cluster.attempt["number"]) == ("Starting", 1)
    assert (cluster.status["method"], cluster.status["tuning"]) == ("sft", "lora")
    assert cluster.status["resolved"]["worldSize"] == 1


def test_what_pods_refer_to_is_created_before_the_ray_job() -> None:
    kinds = [create.kind for create in Cluster().decide().create]
    assert kinds[-1] == RAY_JOB
    assert kinds.count(RAY_JOB) == 1


def test_the_second_pass_learns_the_ray_jobs_uid_and_the_third_changes_nothing() -> None:
    cluster = Cluster()
    cluster.step()
    assert "uid" not in cluster.attempt
    cluster.step()
    assert cluster.attempt["uid"] == cluster.ray_job()["metadata"]["uid"]
    decision = cluster.step()
    assert (decision.create, decision.delete, decision.status, decision.events) == ((), (), None, ())


def test_a_job_goes_from_starting_to_running_to_succeeded() -> None:
    cluster = Cluster()
    cluster.settle()
    phases = [cluster.status["phase"]]
    cluster.running().report(Stage.LOADING_MODEL).settle()
    phases.append(cluster.status["phase"])
    cluster.wait(30).report(step=3, metrics={"loss": 1.5}).settle()
    phases.append(cluster.status["phase"])
    assert cluster.status["progress"]["metrics"] == {"loss": "1.5"}
    cluster.wait(30).outcome(succeeded()).ended("SUCCEEDED").settle()
    phases.append(cluster.status["phase"])
    assert phases == ["Starting", "Starting", "Running", "Succeeded"]
    assert cluster.holds("Complete") == ("True", "Succeeded")
    assert cluster.status["artifacts"][0]["uri"] == "file:///runs/model"
    assert cluster.status["finishedAt"] == "2026-01-01T12:01:00Z"
    assert cluster.events == ["AttemptStarted", "Complete"]


def test_success_waits_a_moment_for_the_trainers_last_word() -> None:
    cluster = started()
    cluster.ended("SUCCEEDED").step()
    assert cluster.status["phase"] == "Running"
    cluster.outcome(succeeded()).step()
    assert (cluster.status["phase"], len(cluster.status["artifacts"])) == ("Succeeded", 1)


def test_success_without_the_trainers_last_word_is_a_success_without_an_artifact() -> None:
    cluster = started()
    assert cluster.ended("SUCCEEDED").step().requeue_after == 15
    cluster.wait(15).settle()
    assert cluster.status["phase"] == "Succeeded"
    assert cluster.holds("ArtifactsPublished") == ("False", "NoArtifact")


def test_the_trainers_word_ends_the_job_before_kuberay_has_noticed() -> None:
    cluster = started()
    cluster.outcome(succeeded()).settle()
    assert cluster.status["phase"] == "Succeeded"
    assert cluster.named(RAY_JOB) == ["example-1"]
    cluster.wait(301).settle()
    assert cluster.named(RAY_JOB) == []


def test_pods_that_cannot_start_are_told_in_the_condition() -> None:
    cluster = Cluster()
    cluster.settle()
    scheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: too few GPUs"}
    cluster.pod("example-1-w0", {"phase": "Pending", "conditions": [scheduled]}).settle()
    assert cluster.holds("ClusterReady") == ("False", "Unschedulable")
    assert "too few GPUs" in cluster.says("ClusterReady")


def test_a_run_that_a_person_stopped_in_ray_is_cancelled() -> None:
    cluster = started()
    cluster.outcome(stopped()).ended("STOPPED").settle()
    assert cluster.holds("Failed") == ("True", "Cancelled")
    assert "failure" not in cluster.status


# Failures


def test_a_lost_node_leads_to_a_second_attempt_after_the_back_off() -> None:
    cluster = break_attempt(started())
    assert (cluster.status["phase"], cluster.status["restarts"]) == ("Pending", 1)
    assert cluster.attempt["outcome"] == "NodeLost"
    assert cluster.attempt["action"] == "Retry"
    assert cluster.status["postMortem"]["failureClass"] == "NodeLost"
    assert cluster.step().requeue_after == 10
    assert cluster.named(RAY_JOB) == ["example-1"]
    cluster.wait(10).settle()
    assert cluster.named(RAY_JOB) == ["example-2"]
    assert cluster.named(CONFIG_MAP) == ["example-2-plan", "example-progress"]
    assert (cluster.attempt["number"], cluster.status["phase"]) == (2, "Starting")
    assert "nextAttemptAt" not in cluster.status


def test_the_second_attempt_does_not_inherit_the_first_ones_report() -> None:
    cluster = break_attempt(started())
    cluster.wait(10).settle()
    assert cluster.holds("Running") == ("False", "NotStarted")
    assert "runningAt" not in cluster.attempt
    assert cluster.status["progress"]["step"] == 1


@pytest.mark.parametrize("kind", [FailureClass.USER_ERROR, FailureClass.DATA_ERROR, FailureClass.NON_FINITE_LOSS])
def test_what_a_person_must_mend_fails_at_once(kind: FailureClass) -> None:
    cluster = break_attempt(started(), kind)
    assert cluster.status["phase"] == "Failed"
    assert (cluster.status["failure"], cluster.holds("Failed")) == (kind.value, ("True", kind.value))
    assert cluster.holds("Valid") == (
        ("True", "Accepted") if kind is FailureClass.NON_FINITE_LOSS else ("False", kind.value)
    )
    assert cluster.wait(3600).settle() == GONE


def test_the_job_fails_when_the_restarts_are_used_up_and_keeps_the_class() -> None:
    cluster = started({"failurePolicy": {"maxRestarts": 1}})
    break_attempt(cluster, step=1).wait(10).settle()
    cluster.running().report(step=5).settle()
    break_attempt(cluster, step=5)
    assert cluster.holds("Failed") == ("True", "MaxRestartsExceeded")
    assert cluster.status["failure"] == "NodeLost"
    assert (cluster.status["restarts"], len(cluster.status["attempts"])) == (1, 2)
    assert cluster.events.count("AttemptFailed") == 2


def test_preemptions_are_not_counted_as_restarts() -> None:
    cluster = started({"failurePolicy": {"maxRestarts": 0}})
    for number in range(2, 5):
        break_attempt(cluster, FailureClass.PREEMPTED).wait(10).settle()
        assert cluster.attempt["number"] == number
        cluster.running().report(step=1).settle()
    assert (cluster.status["restarts"], cluster.status["preemptions"]) == (0, 3)


def test_out_of_memory_is_tried_again_with_half_the_micro_batch_until_there_is_no_half() -> None:
    changes = {"training.microBatchSize": 4, "training.globalBatchSize": 8, "failurePolicy": {"maxRestarts": 9}}
    cluster = started(changes)
    sizes = []
    for _ in range(2):
        break_attempt(cluster, FailureClass.OUT_OF_MEMORY).wait(600).settle()
        resolved = cluster.status["resolved"]
        sizes.append((cluster.attempt["microBatchSize"], resolved["gradientAccumulationSteps"]))
        plan = json.loads(cluster.objects[CONFIG_MAP, f"example-{cluster.attempt['number']}-plan"]["data"]["plan.json"])
        assert plan["batch"]["microBatchSize"] == cluster.attempt["microBatchSize"]
        cluster.running().report(step=1).settle()
    assert sizes == [(2, 4), (1, 8)]
    break_attempt(cluster, FailureClass.OUT_OF_MEMORY)
    assert cluster.holds("Failed") == ("True", "OutOfMemory")


def test_a_smaller_micro_batch_stays_for_the_attempts_after_it() -> None:
    cluster = started({"training.microBatchSize": 4, "training.globalBatchSize": 8})
    break_attempt(cluster, FailureClass.OUT_OF_MEMORY).wait(10).settle()
    cluster.running().report(step=2).settle()
    break_attempt(cluster, FailureClass.NODE_LOST, step=2).wait(20).settle()
    assert (cluster.attempt["number"], cluster.attempt["microBatchSize"]) == (3, 2)


def test_attempts_that_come_no_further_end_the_job() -> None:
    cluster = started({"failurePolicy": {"maxRestarts": 100}})
    for _ in range(3):
        break_attempt(cluster, step=1).wait(600).settle()
        cluster.running().report(step=1).settle()
    break_attempt(cluster, step=1)
    assert cluster.holds("Failed") == ("True", "NoProgress")
    assert cluster.status["failure"] == "NodeLost"


def test_a_failed_pods_evidence_outlives_the_pod() -> None:
    cluster = started()
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    cluster.pod("example-1-w0", {"phase": "Failed", "containerStatuses": [{"name": "ray", "state": killed}]}).settle()
    assert cluster.status["postMortem"]["reason"] == "OOMKilled"
    cluster.pods.clear()
    cluster.ended(message="").settle()
    assert cluster.attempt["outcome"] == "OutOfMemory"
    assert cluster.status["postMortem"]["pod"] == "example-1-w0"


def test_a_failure_can_hold_the_job_until_a_person_lets_it_go() -> None:
    rules = [{"classes": ["NonFiniteLoss"], "action": "Suspend"}]
    cluster = break_attempt(started({"failurePolicy": {"rules": rules}}), FailureClass.NON_FINITE_LOSS)
    assert (cluster.status["phase"], cluster.holds("Suspended")) == ("Suspended", ("True", "FailurePolicy"))
    cluster.wait(10_000).settle()
    assert cluster.status["phase"] == "Suspended"
    cluster.spec(suspend=True).settle()
    assert cluster.holds("Suspended") == ("True", "Requested")
    cluster.spec(suspend=False).settle()
    assert (cluster.attempt["number"], cluster.status["phase"]) == (2, "Starting")


# Time


def test_an_attempt_that_does_not_start_is_ended_and_tried_again() -> None:
    cluster = Cluster({"lifecycle": {"startDeadlineSeconds": 600}})
    assert cluster.settle().requeue_after == 600
    state = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "registry/x"'}
    waiting = {"containerStatuses": [{"name": "ray", "state": {"waiting": state}}]}
    cluster.pod("example-1-head", waiting).wait(600).settle()
    assert cluster.attempt["outcome"] == "StartTimeout"
    assert 'ImagePullBackOff (Back-off pulling image "registry/x")' in cluster.attempt["message"]
    assert cluster.named(RAY_JOB) == []
    cluster.wait(10).settle()
    assert cluster.attempt["number"] == 2


def test_a_report_from_before_training_is_a_start() -> None:
    cluster = Cluster({"lifecycle": {"startDeadlineSeconds": 600}})
    cluster.settle()
    cluster.running().wait(500).report(Stage.PREPARING_DATA).settle()
    cluster.wait(500).settle()
    assert "endedAt" not in cluster.attempt


def test_a_silent_attempt_is_ended_as_hung() -> None:
    cluster = started({"failurePolicy": {"hangTimeoutSeconds": 300}})
    assert cluster.settle().requeue_after == 300
    cluster.wait(200).report(step=2).settle()
    cluster.wait(299).settle()
    assert cluster.status["phase"] == "Running"
    cluster.wait(1).settle()
    assert (cluster.attempt["outcome"], cluster.attempt["step"]) == ("Hang", 2)
    assert cluster.named(RAY_JOB) == []


def test_an_attempt_that_falls_silent_in_a_part_of_a_step_says_in_which_and_who_was_at_work() -> None:
    cluster = started({"failurePolicy": {"hangTimeoutSeconds": 300}})
    cluster.report(step=2, phase="score", role="reward length").settle()
    running = next(one for one in cluster.status["conditions"] if one["type"] == "Running")
    assert running["message"] == "Training: score (reward length)"
    cluster.wait(300).settle()
    assert cluster.attempt["outcome"] == "Hang"
    assert cluster.attempt["message"].endswith("The last report is of Training: score (reward length).")


def test_the_last_hung_cluster_is_kept_to_be_looked_at() -> None:
    cluster = started(
        {
            "failurePolicy": {"hangTimeoutSeconds": 300, "maxRestarts": 0},
            "lifecycle": {"keepFailedClusterSeconds": 3600},
        }
    )
    cluster.wait(300).settle()
    assert cluster.status["phase"] == "Failed"
    assert cluster.named(RAY_JOB) == ["example-1"]
    cluster.wait(3600).settle()
    assert cluster.named(RAY_JOB) == []


def test_the_active_deadline_goes_over_all_attempts_and_leaves_out_the_waits() -> None:
    cluster = started({"lifecycle": {"activeDeadlineSeconds": 600}})  # 60 s have passed
    break_attempt(cluster.wait(140)).wait(10).settle()
    assert cluster.status["activeSeconds"] == 200
    cluster.running().wait(100).report(step=2).settle()
    cluster.spec(suspend=True).settle()
    assert cluster.status["activeSeconds"] == 300
    cluster.wait(100_000).spec(suspend=False).settle()
    cluster.running().report(step=3).wait(299).settle()
    assert "endedAt" not in cluster.attempt
    cluster.wait(1).settle()
    assert cluster.holds("Failed") == ("True", "DeadlineExceeded")
    assert cluster.named(RAY_JOB) == []
    assert cluster.status["failure"] == "DeadlineExceeded"


def test_no_attempt_is_started_when_all_the_time_is_used_up() -> None:
    cluster = started({"lifecycle": {"activeDeadlineSeconds": 100}})
    cluster.wait(45).outcome(failed(FailureClass.NODE_LOST)).ended().settle()
    cluster.job = {**cluster.job, "status": {**cluster.status, "activeSeconds": 100}} if cluster.job else None
    cluster.wait(10).settle()
    assert cluster.holds("Failed") == ("True", "DeadlineExceeded")


def test_a_job_is_deleted_when_its_time_to_live_has_passed() -> None:
    cluster = started({"lifecycle": {"ttlSecondsAfterFinished": 60}})
    decision = cluster.outcome(succeeded()).ended("SUCCEEDED").settle()
    assert decision.requeue_after == 60
    decision = cluster.wait(60).step()
    assert [one.kind for one in decision.delete] == [FINETUNE_JOB]
    assert cluster.job is None


def test_a_clock_that_jumps_back_ends_nothing_and_adds_no_time() -> None:
    cluster = started({"failurePolicy": {"hangTimeoutSeconds": 300}})
    cluster.wait(-86_400).settle()
    assert cluster.status["phase"] == "Running"
    break_attempt(cluster)
    assert cluster.status["activeSeconds"] == 0
    assert cluster.attempt["endedAt"] == cluster.attempt["createdAt"]


# Suspension


def test_suspending_ends_the_attempt_and_resuming_starts_the_next() -> None:
    cluster = started()
    cluster.finalized = True
    cluster.spec(suspend=True).settle()
    assert (cluster.attempt["outcome"], cluster.status["phase"]) == ("Suspended", "Running")
    assert cluster.holds("Suspended") == ("False", "Suspending")
    cluster.let_go().settle()
    assert (cluster.status["phase"], cluster.holds("Suspended")) == ("Suspended", ("True", "Requested"))
    assert (cluster.status["restarts"], cluster.status["preemptions"]) == (0, 0)
    cluster.spec(suspend=False).settle()
    assert (cluster.attempt["number"], cluster.status["phase"]) == (2, "Starting")
    assert cluster.events == ["AttemptStarted", "Suspended", "AttemptStarted", "Resumed"]


def test_suspending_ends_the_wait_for_another_attempt() -> None:
    cluster = break_attempt(started({"failurePolicy": {"backoff": {"initialSeconds": 600}}}))
    cluster.spec(suspend=True).settle()
    assert "nextAttemptAt" not in cluster.status
    cluster.spec(suspend=False).settle()
    assert cluster.attempt["number"] == 2


def test_a_job_that_is_created_suspended_starts_nothing() -> None:
    cluster = Cluster({"suspend": True})
    cluster.settle()
    assert (cluster.named(RAY_JOB), cluster.status["phase"]) == ([], "Suspended")
    assert cluster.holds("Valid") == ("True", "Accepted")


def test_no_attempt_starts_while_the_last_one_is_still_going_away() -> None:
    cluster = started()
    cluster.finalized = True
    cluster.spec(suspend=True).settle()
    cluster.spec(suspend=False).settle()
    assert cluster.named(RAY_JOB) == ["example-1"]
    assert cluster.holds("ClusterReady") == ("False", "Deleting")
    cluster.let_go().settle()
    assert cluster.named(RAY_JOB) == ["example-2"]


def test_a_job_may_come_back_with_another_number_of_workers() -> None:
    cluster = started()
    cluster.spec(suspend=True).settle()
    cluster.spec(suspend=False, cluster={"workers": {"replicas": 2}}).settle()
    assert cluster.status["resolved"]["worldSize"] == 2
    assert cluster.ray_job()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


def test_an_attempt_that_succeeds_before_it_can_be_suspended_has_succeeded() -> None:
    cluster = started()
    cluster.outcome(succeeded()).ended("SUCCEEDED").spec(suspend=True).settle()
    assert cluster.status["phase"] == "Succeeded"


@pytest.mark.parametrize("told", [None, stopped(), failed(FailureClass.UNKNOWN)])
def test_a_suspension_whose_status_was_refused_is_still_one(told: Any) -> None:
    cluster = started().spec(suspend=True)
    decision = cluster.decide()
    for delete in decision.delete:
        cluster.delete(delete.kind, delete.key.name)
    if told is not None:
        cluster.outcome(told)
    cluster.settle()
    assert (cluster.attempt["outcome"], cluster.status["phase"]) == ("Suspended", "Suspended")


# Queues

QUEUED = {"scheduling": {"queue": "team"}}


def test_a_queued_attempt_waits_without_a_deadline_until_it_is_admitted() -> None:
    cluster = Cluster(QUEUED | {"lifecycle": {"startDeadlineSeconds": 600}})
    assert cluster.settle().requeue_after is None
    assert cluster.ray_job()["spec"]["suspend"] is True
    assert (cluster.status["phase"], cluster.holds("Admitted")) == ("Queued", ("False", "Queued"))
    cluster.wait(100_000).kuberay(suspend=False)
    assert cluster.settle().requeue_after == 600
    assert (cluster.status["phase"], cluster.holds("Admitted")) == ("Starting", ("True", "Admitted"))
    assert cluster.events == ["AttemptStarted", "Queued", "Admitted"]


def test_an_evicted_attempt_goes_back_to_the_queue_and_keeps_its_number_and_its_ray_job() -> None:
    cluster = Cluster(QUEUED | {"lifecycle": {"activeDeadlineSeconds": 1000}})
    cluster.settle()
    cluster.kuberay(suspend=False).settle()
    cluster.running().wait(100).report(step=2).settle()
    cluster.wait(100).kuberay(suspend=True, jobDeploymentStatus="Suspending").settle()
    assert (cluster.status["phase"], cluster.attempt["number"]) == ("Queued", 1)
    assert "runningAt" not in cluster.attempt
    cluster.kuberay(jobDeploymentStatus="Suspended", jobStatus="").wait(100_000).settle()
    decision = cluster.kuberay(suspend=False, jobDeploymentStatus="Initializing").settle()
    assert decision.requeue_after == 800
    assert cluster.status["phase"] == "Starting"
    cluster.running().wait(400).report(step=3).settle()
    assert cluster.status["phase"] == "Running"
    assert cluster.named(RAY_JOB) == ["example-1"]
    assert cluster.events.count("Evicted") == 1


def test_the_start_deadline_counts_from_the_last_admission() -> None:
    cluster = Cluster(QUEUED | {"lifecycle": {"startDeadlineSeconds": 600}})
    cluster.settle()
    cluster.kuberay(suspend=False).wait(500).settle()
    cluster.kuberay(suspend=True).settle()
    cluster.kuberay(suspend=False).wait(500).settle()
    assert "endedAt" not in cluster.attempt
    cluster.wait(600).settle()
    assert cluster.attempt["outcome"] == "StartTimeout"


# The spec and the runtime


def test_a_bad_spec_is_told_with_its_field_and_starts_nothing() -> None:
    cluster = Cluster()
    assert cluster.job is not None
    cluster.job["spec"]["training"]["learningRate"] = "fast"
    cluster.settle()
    assert cluster.holds("Valid") == ("False", "InvalidSpec")
    assert "spec.training.learningRate" in cluster.says("Valid")
    assert (cluster.named(RAY_JOB), cluster.status["phase"]) == ([], "Pending")
    assert cluster.events == ["InvalidSpec"]


def test_a_spec_that_turns_bad_leaves_the_attempt_that_goes_on_alone() -> None:
    cluster = started()
    cluster.spec(lifecycle={"startDeadlineSeconds": 0}).settle()
    assert cluster.holds("Valid") == ("False", "InvalidSpec")
    cluster.wait(60).report(step=5).settle()
    assert (cluster.status["phase"], cluster.status["progress"]["step"]) == ("Running", 5)
    break_attempt(cluster).wait(3600).settle()
    assert cluster.attempt["number"] == 1
    cluster.spec(lifecycle={}).settle()
    assert (cluster.attempt["number"], cluster.holds("Valid")) == (2, ("True", "Accepted"))


def test_what_planning_refuses_is_told_with_its_field() -> None:
    cluster = Cluster({"cluster.workers.replicas": 3, "training.globalBatchSize": 8})
    cluster.settle()
    assert cluster.holds("Valid") == ("False", "PlanRefused")
    assert "spec.training.globalBatchSize" in cluster.says("Valid")


def test_a_job_without_its_runtime_waits_and_says_which() -> None:
    cluster = Cluster({"runtimeRef": {"name": "pool"}})
    cluster.settle()
    assert (cluster.holds("Valid"), cluster.status["phase"]) == (("False", "RuntimeNotFound"), "Pending")
    assert "pool" in cluster.says("Valid")
    cluster.use_runtime({"image": "registry/trainer:1"}).settle()
    assert (cluster.holds("Valid"), cluster.status["phase"]) == (("True", "Accepted"), "Starting")
    head = cluster.ray_job()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"] == "registry/trainer:1"


def test_a_runtime_that_makes_no_sense_is_told() -> None:
    cluster = Cluster({"runtimeRef": {"name": "pool"}}).use_runtime({"workers": {"gpus": -1}})
    cluster.settle()
    assert cluster.holds("Valid") == ("False", "RuntimeInvalid")
    assert "spec.workers.gpus" in cluster.says("Valid")


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_job_keeps_the_runtime_that_it_began_with(change: str) -> None:
    cluster = Cluster({"runtimeRef": {"name": "pool"}}).use_runtime({"image": "registry/trainer:1"})
    cluster.settle()
    begun_with = cluster.status["resolved"]["runtimeHash"]
    cluster.running().report(step=1).settle()
    cluster.use_runtime({"image": "registry/trainer:2"})
    if change == "gone":
        cluster.runtime = None
    break_attempt(cluster).wait(10).settle()
    head = cluster.ray_job(2)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"] == "registry/trainer:1"
    assert cluster.status["resolved"]["runtimeHash"] == begun_with


def test_a_lost_snapshot_is_taken_again_from_the_runtime() -> None:
    cluster = Cluster({"runtimeRef": {"name": "pool"}}).use_runtime()
    cluster.settle()
    cluster.delete(CONFIG_MAP, "example-runtime")
    cluster.settle()
    assert "example-runtime" in cluster.named(CONFIG_MAP)


def test_a_snapshot_that_somebody_replaced_is_not_believed() -> None:
    cluster = Cluster({"runtimeRef": {"name": "pool"}}).use_runtime({"image": "registry/trainer:1"})
    cluster.settle()
    cluster.running().report(step=1).settle()
    cluster.objects[CONFIG_MAP, "example-runtime"]["data"] = {"runtime.json": "{}"}
    break_attempt(cluster).wait(10).settle(12)
    assert "registry/trainer:1" in cluster.objects[CONFIG_MAP, "example-runtime"]["data"]["runtime.json"]
    assert cluster.attempt["number"] == 2


# Other jobs

CHAINED = {"model.source": "job://sft"}
DONE = {
    "conditions": [{"type": "Complete", "status": "True", "reason": "Succeeded"}],
    "artifacts": [{"uri": "file:///runs/sft/model", "kind": "model", "digest": "b3", "bytes": 1}],
}


def plan_of(cluster: Cluster, attempt: int) -> Any:
    return json.loads(cluster.objects[CONFIG_MAP, f"example-{attempt}-plan"]["data"]["plan.json"])


def test_a_job_waits_for_the_job_that_it_names_and_starts_from_its_model() -> None:
    cluster = Cluster(CHAINED)
    cluster.settle()
    assert (cluster.status["phase"], cluster.holds("Admitted")) == ("Pending", ("False", "DependencyPending"))
    cluster.dependencies["sft"] = another_job("sft", {"phase": "Running"})
    cluster.settle()
    assert "job://sft is Running" in cluster.says("Admitted")
    cluster.dependencies["sft"] = another_job("sft", DONE)
    cluster.settle()
    assert cluster.status["phase"] == "Starting"
    assert plan_of(cluster, 1)["model"]["source"] == "file:///runs/sft/model"


def test_a_job_whose_model_will_never_do_is_refused_while_it_trains_and_no_longer_when_another_takes_its_name() -> None:
    cluster = Cluster(CHAINED)
    cluster.dependencies["sft"] = job_document({"method": {"reward": {}}}, name="sft")
    cluster.settle()
    assert cluster.holds("Valid") == ("False", "DependencyUnfit")
    assert cluster.says("Valid").startswith("spec.model.source: is a job of method reward")
    cluster.dependencies["sft"] = another_job("sft", {"phase": "Running"})
    cluster.settle()
    assert cluster.holds("Valid") == ("True", "Accepted")
    assert cluster.holds("Admitted") == ("False", "DependencyPending")


def test_a_job_fails_with_the_reason_of_the_job_that_it_needs() -> None:
    cluster = Cluster(CHAINED)
    failure = {"type": "Failed", "status": "True", "reason": "DataError", "message": "row 7 is empty"}
    cluster.dependencies["sft"] = another_job("sft", {"conditions": [failure]})
    cluster.settle()
    assert cluster.holds("Failed") == ("True", "DependencyFailed")
    assert "row 7 is empty" in cluster.says("Failed")
    assert cluster.status["failure"] == "DependencyFailed"


def test_a_job_fails_with_the_job_that_it_needs_also_where_another_ones_model_would_not_do() -> None:
    cluster = Cluster({**CHAINED, "method": {"distill": {"teacher": {"source": "job://big"}}}})
    failure = {"type": "Failed", "status": "True", "reason": "DataError", "message": "row 7 is empty"}
    cluster.dependencies["sft"] = another_job("sft", {"conditions": [failure]})
    cluster.dependencies["big"] = job_document({"method": {"reward": {}}}, name="big")
    cluster.settle()
    assert cluster.holds("Failed") == ("True", "DependencyFailed")


def test_later_attempts_need_the_other_job_no_more() -> None:
    cluster = Cluster(CHAINED)
    cluster.dependencies["sft"] = another_job("sft", DONE)
    cluster.settle()
    cluster.dependencies["sft"] = None
    for number in (2, 3):
        cluster.running().report(step=number).settle()
        break_attempt(cluster, FailureClass.PREEMPTED).wait(10).settle()
        assert plan_of(cluster, number)["model"]["source"] == "file:///runs/sft/model"


def test_later_attempts_keep_both_the_model_and_the_teacher_that_they_began_with() -> None:
    teacher = {"distill": {"teacher": {"source": "job://big"}}}
    cluster = Cluster({**CHAINED, "method": teacher})
    cluster.dependencies["sft"] = another_job("sft", DONE)
    cluster.settle()
    assert "job://big" in cluster.says("Admitted")
    artifacts: Any = DONE["artifacts"]
    written = {**artifacts[0], "uri": "file:///runs/big/model"}
    cluster.dependencies["big"] = another_job("big", {**DONE, "artifacts": [written]})
    cluster.settle()
    began = plan_of(cluster, 1)
    assert began["model"]["source"] == "file:///runs/sft/model"
    assert began["method"]["distill"]["teacher"]["source"] == "file:///runs/big/model"
    cluster.dependencies.clear()
    cluster.running().report(step=1).settle()
    break_attempt(cluster, FailureClass.PREEMPTED).wait(10).settle()
    assert plan_of(cluster, 2)["model"] == began["model"]
    assert plan_of(cluster, 2)["method"] == began["method"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model.source": "job://example"}, "spec.model.source"),
        ({"method": {"distill": {"teacher": {"source": "job://example"}}}}, "spec.method.distill.teacher.source"),
    ],
)
def test_a_job_that_names_itself_is_refused(changes: dict[str, Any], field: str) -> None:
    cluster = Cluster(changes)
    cluster.settle()
    assert cluster.holds("Valid") == ("False", "InvalidSpec")
    assert f"{field}: names the job itself" in cluster.says("Valid")


# Other hands


def test_a_ray_job_deleted_by_hand_is_an_attempt_that_ended() -> None:
    cluster = started()
    cluster.delete(RAY_JOB, "example-1")
    cluster.settle()
    assert (cluster.attempt["outcome"], cluster.attempt["action"]) == ("Unknown", "Retry")
    assert "was deleted" in cluster.attempt["message"]
    cluster.wait(10).settle()
    assert cluster.named(RAY_JOB) == ["example-2"]


def test_a_ray_job_of_our_name_with_another_uid_is_not_ours_to_follow() -> None:
    cluster = started()
    cluster.ray_job()["metadata"]["uid"] = "another"
    cluster.settle()
    assert cluster.attempt["outcome"] == "Unknown"
    cluster.wait(10).settle()
    assert cluster.named(RAY_JOB) == ["example-2"]


def test_trainers_that_were_stopped_by_the_deletion_do_not_cancel_the_job() -> None:
    cluster = started()
    cluster.outcome(stopped()).delete(RAY_JOB, "example-1")
    cluster.settle()
    assert (cluster.attempt["outcome"], cluster.attempt["action"]) == ("Unknown", "Retry")


def test_a_success_is_not_lost_with_its_ray_job() -> None:
    cluster = started()
    cluster.outcome(succeeded()).delete(RAY_JOB, "example-1")
    cluster.settle()
    assert cluster.status["phase"] == "Succeeded"


@pytest.mark.parametrize("name", ["example-1-plan", "example-progress"])
def test_a_config_map_deleted_by_hand_is_made_again(name: str) -> None:
    cluster = started()
    cluster.delete(CONFIG_MAP, name)
    cluster.settle()
    assert name in cluster.named(CONFIG_MAP)
    assert "endedAt" not in cluster.attempt


def test_a_plan_that_is_made_again_keeps_the_smaller_micro_batch() -> None:
    cluster = started({"training.microBatchSize": 4, "training.globalBatchSize": 8})
    break_attempt(cluster, FailureClass.OUT_OF_MEMORY).wait(10).settle()
    cluster.delete(CONFIG_MAP, "example-2-plan")
    cluster.settle()
    assert plan_of(cluster, 2)["batch"]["microBatchSize"] == 2


@pytest.mark.parametrize(
    "data", [None, [], {"progress.json": "{"}, {"attempt": "1", "progress.json": '{"stage": "Dancing"}'}]
)
def test_a_progress_config_map_edited_by_hand_is_harmless(data: Any) -> None:
    cluster = started()
    cluster.objects[CONFIG_MAP, "example-progress"]["data"] = data
    cluster.settle()
    assert (cluster.status["phase"], cluster.status["progress"]["step"]) == ("Running", 1)


@pytest.mark.parametrize(("kind", "name"), [(RAY_JOB, "example-1"), (CONFIG_MAP, "example-progress")])
def test_an_object_of_somebody_else_with_our_name_is_never_touched(kind: Any, name: str) -> None:
    cluster = Cluster()
    before = json.dumps(cluster.foreign(kind, name))
    decision = cluster.settle()
    assert (cluster.holds("ClusterReady"), decision.requeue_after) == (("False", "NameTaken"), 60)
    assert name in cluster.says("ClusterReady")
    assert json.dumps(cluster.objects[kind, name]) == before
    assert len(cluster.objects) == 1
    del cluster.objects[kind, name]
    cluster.settle()
    assert cluster.status["phase"] == "Starting"


def test_ray_jobs_prove_attempts_that_the_status_lost() -> None:
    cluster = break_attempt(started())
    cluster.wait(10).settle()
    cluster.running().report(step=2).settle()
    assert cluster.job is not None
    for status in ({}, {"attempts": "many"}, {"phase": "Gone", "attempts": [{"number": "two"}]}):
        cluster.job["status"] = status
        cluster.settle()
        assert [attempt["number"] for attempt in cluster.status["attempts"]] == [2]
        assert (cluster.status["phase"], cluster.named(RAY_JOB)) == ("Running", ["example-2"])


def test_one_bad_value_in_the_status_costs_nothing_else() -> None:
    cluster = break_attempt(started())
    cluster.status["progress"] = {"step": "far"}
    cluster.status["unknown"] = True
    cluster.status["attempts"][0]["message"] = 7
    cluster.settle()
    assert (cluster.status["restarts"], cluster.attempt["outcome"]) == (1, "NodeLost")


def test_a_second_active_ray_job_is_ended() -> None:
    cluster = started()
    extra = json.loads(json.dumps(cluster.ray_job()))
    extra["metadata"]["name"] = "example-7"
    cluster.create(RAY_JOB, extra)
    cluster.settle()
    assert cluster.named(RAY_JOB) == ["example-7"]
    assert [(a["number"], "endedAt" in a) for a in cluster.status["attempts"]] == [(1, True), (7, False)]


def test_what_a_broken_off_pass_left_is_taken_up() -> None:
    cluster = Cluster()
    decision = cluster.decide()
    for count in range(len(decision.create) + 1):
        again = Cluster()
        for create in decision.create[:count]:
            again.create(create.kind, create.document)
        again.settle()
        assert (again.named(RAY_JOB), again.attempt["number"]) == (["example-1"], 1)


def test_a_plan_that_a_broken_off_pass_left_from_another_spec_is_made_anew() -> None:
    cluster = Cluster()
    for create in cluster.decide().create:
        if create.kind == CONFIG_MAP:
            cluster.create(create.kind, create.document)
    cluster.spec(cluster={"workers": {"replicas": 2}}).settle()
    assert plan_of(cluster, 1)["workers"]["replicas"] == 2


# Whose job it is, and faults of our own


def test_a_job_of_another_manager_is_left_alone() -> None:
    cluster = Cluster({"managedBy": "example.com/other"})
    assert cluster.step() == GONE


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    cluster = started()
    assert cluster.job is not None
    cluster.job["metadata"]["deletionTimestamp"] = "2026-01-01T13:00:00Z"
    cluster.delete(RAY_JOB, "example-1")
    assert cluster.step() == GONE


def test_an_ended_job_stays_ended_and_only_says_that_it_saw_the_change() -> None:
    cluster = break_attempt(started(), FailureClass.USER_ERROR)
    before = dict(cluster.status)
    cluster.spec(suspend=True).settle()
    assert cluster.status == before | {"observedGeneration": 2}


def test_the_generation_that_was_seen_never_goes_back() -> None:
    cluster = started()
    cluster.status["observedGeneration"] = 9
    cluster.settle()
    assert cluster.status["observedGeneration"] == 9


def test_a_fault_in_a_builder_is_told_on_the_job_and_the_next_version_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    with monkeypatch.context() as broken:
        nothing: dict[str, Any] = {}
        broken.setattr(launch, "build_rayjob", lambda *_: nothing["nothing"])
        decision = cluster.settle()
        assert (cluster.holds("Valid"), decision.requeue_after) == (("False", "InternalError"), 300)
        assert "KeyError('nothing')" in cluster.says("Valid")
        assert "test_decide.py" in cluster.says("Valid")
        assert (cluster.objects, cluster.events) == ({}, ["InternalError"])
    cluster.settle()
    assert (cluster.holds("Valid"), cluster.status["phase"]) == (("True", "Accepted"), "Starting")


def test_a_fault_that_reads_differently_each_time_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(object())

    monkeypatch.setattr(launch, "build_rayjob", fail)
    Cluster().settle(passes=2)


def test_what_is_said_of_pods_does_not_depend_on_their_order() -> None:
    cluster = Cluster()
    cluster.settle()
    for name in ("b", "a", "c"):
        cluster.pod(name, {"containerStatuses": [{"name": "ray", "state": {"waiting": {"reason": "ErrImagePull"}}}]})
    cluster.settle()
    assert "pod a waits" in cluster.says("ClusterReady")
    cluster.pods.reverse()
    assert cluster.step().status is None


def test_the_same_world_gives_the_same_decision() -> None:
    cluster = started()
    world = cluster.world()
    first, second = (decide(world.job, observe(world), cluster.now, SETTINGS) for _ in range(2))
    assert first == second
    assert cluster.world() == world


@pytest.mark.parametrize("job", [{}, {"metadata": None}, {"metadata": {"name": "x", "uid": "u"}}, [], None, "job"])
def test_what_is_no_job_is_no_reason_to_fall_over(job: Any) -> None:
    decide(job, observe(World(job)), NOON, SETTINGS)


def test_times_are_whole_seconds_in_utc() -> None:
    cluster = Cluster()
    cluster.now = NOON + timedelta(microseconds=123_456)
    cluster.settle()
    assert cluster.attempt["createdAt"] == "2026-01-01T12:00:00Z"
