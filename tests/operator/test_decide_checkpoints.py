"""What a job's checkpoints do to its status, its attempts and its suspension."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.progress import Stage
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB
from tests.operator.decide_factories import Cluster, failed, saved, stopped, succeeded

SAVES: dict[str, Any] = {"checkpoint": {"everySteps": 10}}


def training(changes: dict[str, Any] | None = None, step: int = 1, **report: Any) -> Cluster:
    """A job that saves, whose first attempt trains."""
    cluster = Cluster(SAVES | (changes or {}))
    cluster.settle()
    cluster.running().wait(60).report(step=step, **report).settle()
    return cluster


def next_attempt(cluster: Cluster, step: int, kind: FailureClass = FailureClass.NODE_LOST, **report: Any) -> Cluster:
    """The attempt that goes on fails; another one trains."""
    cluster.outcome(failed(kind)).ended().settle()
    cluster.wait(600).settle()
    cluster.running().wait(60).report(step=step, **report).settle()
    return cluster


def kept(cluster: Cluster) -> int | None:
    """Steps in the checkpoint of the status."""
    found: int | None = (cluster.status.get("checkpoint") or {}).get("step")
    return found


# The newest checkpoint


def test_the_status_tells_the_newest_checkpoint_whole() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    assert cluster.status["checkpoint"] == {
        "uri": "pvc://runs/step-10",
        "step": 10,
        "savedAt": "2026-01-01T12:00:00Z",
        "worldSize": 2,
        "bytes": 1000,
    }
    assert cluster.holds("Checkpointed") == ("True", "Saved")
    assert "Step 10 is saved at pvc://runs/step-10" in cluster.says("Checkpointed")
    assert cluster.attempt["checkpointStep"] == 10


@pytest.mark.parametrize(
    ("changes", "report", "condition"),
    [
        pytest.param({}, {}, ("False", "NotYet"), id="none yet"),
        pytest.param({"checkpoint": None}, {}, ("False", "NotAsked"), id="the job wants none"),
        pytest.param({}, {"save_failure": "no space"}, ("False", "SaveFailed"), id="the first cannot be saved"),
        pytest.param(
            {}, {"checkpoint": saved(10), "save_failure": "no space"}, ("True", "SaveFailed"), id="a later one cannot"
        ),
    ],
)
def test_the_condition_says_whether_there_is_one_and_why_not(
    changes: dict[str, Any], report: dict[str, Any], condition: tuple[str, str]
) -> None:
    cluster = training(changes, step=20, **report)
    assert cluster.holds("Checkpointed") == condition
    assert ("no space" in cluster.says("Checkpointed")) is ("save_failure" in report)


def test_the_first_checkpoint_is_an_event_and_those_after_it_are_not() -> None:
    cluster = training(step=10, checkpoint=saved(10))
    for step in (20, 30, 40):
        cluster.wait(60).report(step=step, checkpoint=saved(step)).settle()
    assert kept(cluster) == 40
    assert cluster.events == ["AttemptStarted", "CheckpointSaved"]


def test_a_save_that_fails_is_a_warning_each_time_it_begins_to() -> None:
    cluster = training(step=10, checkpoint=saved(10))
    for failure in ("no space", "no space", None, "no space"):
        cluster.wait(60).report(step=20, checkpoint=saved(10), save_failure=failure).settle()
    assert cluster.events.count("CheckpointFailed") == 2


def test_the_checkpoint_stays_when_its_attempt_fails_and_while_the_next_one_starts() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.outcome(failed(FailureClass.NODE_LOST)).ended().settle()
    assert (kept(cluster), cluster.holds("Checkpointed")) == (10, ("True", "Saved"))
    cluster.wait(600).settle()
    cluster.running().report(Stage.LOADING_MODEL).settle()
    assert (cluster.attempt["number"], kept(cluster)) == (2, 10)
    assert "resumedFromStep" not in cluster.attempt


def test_an_attempt_that_goes_on_says_after_which_step_and_its_end_leaves_the_newer_one() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    next_attempt(cluster, 11, resumed_from_step=10, checkpoint=saved(10))
    assert (cluster.attempt["resumedFromStep"], kept(cluster)) == (10, 10)
    assert cluster.events[-1] == "ResumedFromCheckpoint"
    cluster.wait(60).report(step=25, resumed_from_step=10, checkpoint=saved(20)).settle()
    assert (cluster.attempt["resumedFromStep"], cluster.attempt["checkpointStep"], kept(cluster)) == (10, 20, 20)
    assert cluster.events.count("ResumedFromCheckpoint") == 1


def test_an_attempt_that_begins_at_the_beginning_says_so_once_it_trains() -> None:
    cluster = Cluster(SAVES)
    cluster.settle()
    cluster.running().report(Stage.LOADING_MODEL).settle()
    assert "resumedFromStep" not in cluster.attempt
    cluster.report(Stage.EVALUATING).settle()
    assert cluster.attempt["resumedFromStep"] == 0


def test_an_attempt_whose_training_nobody_saw_says_afterwards_where_it_began() -> None:
    cluster = Cluster(SAVES)
    cluster.settle()
    cluster.running().report(Stage.DONE, step=7, total_steps=200, checkpoint=saved(7)).outcome(stopped(7)).ended()
    cluster.settle()
    assert cluster.attempt["resumedFromStep"] == 0


def test_an_attempt_that_ended_before_it_trained_began_nowhere() -> None:
    cluster = Cluster(SAVES)
    cluster.settle()
    cluster.running().report(Stage.DONE).outcome(failed(FailureClass.DATA_ERROR)).ended().settle()
    assert "resumedFromStep" not in cluster.attempt


def test_a_report_that_is_older_than_the_status_takes_nothing_back() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    old = cluster.world()
    cluster.wait(60).report(step=22, checkpoint=saved(20)).settle()
    children = {**cluster.world().children, CONFIG_MAP: old.children[CONFIG_MAP]}
    stale = type(old)(**{**vars(cluster.world()), "children": children})
    cluster.apply(cluster.decide(stale), stale)
    assert kept(cluster) == 20


def test_a_rejected_checkpoint_takes_the_status_back_to_the_one_that_is_used_and_is_told_once() -> None:
    cluster = training(step=22, checkpoint=saved(20))
    rejected: dict[str, Any] = {"rejected_checkpoints": ["step-20: shard 1 is damaged"], "resumed_from_step": 10}
    next_attempt(cluster, 11, checkpoint=saved(10), **rejected)
    assert (kept(cluster), cluster.attempt["resumedFromStep"]) == (10, 10)
    cluster.wait(60).report(step=15, checkpoint=saved(10), **rejected).settle()
    assert cluster.events.count("CheckpointRejected") == 1


def test_the_event_of_a_rejected_checkpoint_names_it_and_why() -> None:
    cluster = training(step=22, checkpoint=saved(20))
    cluster.outcome(failed(FailureClass.NODE_LOST)).ended().settle()
    cluster.wait(600).settle()
    rejected = ["step-20: shard 1 is damaged", "step-10: another model"]
    cluster.running().report(step=1, rejected_checkpoints=rejected)
    told = [event for event in cluster.decide().events if event.reason == "CheckpointRejected"]
    assert [event.type for event in told] == ["Warning", "Warning"]
    assert told[0].message == "Attempt 2 does not go on from step-20: shard 1 is damaged"


def test_an_attempt_that_begins_anew_leaves_no_checkpoint_in_the_status_until_it_has_one() -> None:
    cluster = training(step=22, checkpoint=saved(20))
    cluster.spec(checkpoint={"everySteps": 10, "resume": "never"}).settle()
    next_attempt(cluster, 1)
    assert (kept(cluster), cluster.holds("Checkpointed")) == (None, ("False", "NotYet"))
    cluster.wait(60).report(step=10, checkpoint=saved(10)).settle()
    assert kept(cluster) == 10


def test_a_checkpoint_that_is_saved_on_the_way_out_counts_although_the_attempt_has_ended() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.spec(suspend=True, lifecycle={"suspendGraceSeconds": 0}).settle()
    assert cluster.attempt["outcome"] == "Suspended"
    before = dict(cluster.attempt)
    cluster.report(step=14, checkpoint=saved(14)).settle()
    assert (kept(cluster), cluster.attempt) == (14, before)


def test_an_attempt_that_a_queue_took_back_tells_anew_where_it_goes_on() -> None:
    cluster = Cluster(SAVES | {"scheduling": {"queue": "team"}})
    cluster.settle()
    cluster.kuberay(suspend=False).running().wait(60).report(step=12, checkpoint=saved(10)).settle()
    cluster.wait(600).kuberay(suspend=True, jobDeploymentStatus="Suspending").settle()
    assert (kept(cluster), "resumedFromStep" in cluster.attempt) == (10, False)
    cluster.wait(600).kuberay(suspend=False).running().settle()
    cluster.wait(60).report(step=11, resumed_from_step=10, checkpoint=saved(10)).settle()
    assert (cluster.attempt["number"], cluster.attempt["resumedFromStep"], kept(cluster)) == (1, 10, 10)


def test_a_report_from_before_a_queue_took_the_attempt_back_tells_nothing_of_its_new_start() -> None:
    cluster = Cluster(SAVES | {"scheduling": {"queue": "team"}})
    cluster.settle()
    cluster.kuberay(suspend=False).running().wait(60).report(step=12, checkpoint=saved(10)).settle()
    cluster.wait(1).kuberay(suspend=True).settle()
    cluster.kuberay(suspend=False).running().settle()
    assert "resumedFromStep" not in cluster.attempt
    cluster.wait(60).report(step=11, resumed_from_step=10, checkpoint=saved(10)).settle()
    assert cluster.attempt["resumedFromStep"] == 10


def test_workers_that_are_started_again_go_on_later_and_the_attempt_began_where_it_began() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.wait(60).report(step=11, resumed_from_step=10, checkpoint=saved(10)).settle()
    assert (cluster.attempt["resumedFromStep"], kept(cluster)) == (0, 10)
    assert cluster.events.count("ResumedFromCheckpoint") == 0


def test_workers_that_are_started_again_and_reject_the_newest_take_the_status_back() -> None:
    cluster = training(step=22, checkpoint=saved(20))
    rejected: dict[str, Any] = {"rejected_checkpoints": ["step-20: shard 1 is damaged"], "resumed_from_step": 10}
    for step in (11, 12):
        cluster.wait(60).report(step=step, checkpoint=saved(10), **rejected).settle()
    assert (kept(cluster), cluster.attempt["resumedFromStep"]) == (10, 0)
    assert cluster.events.count("CheckpointRejected") == 1


@pytest.mark.parametrize("number", [-1, 1 << 60])
def test_a_report_with_a_checkpoint_beyond_belief_is_none(number: int) -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.wait(60).report(step=13, checkpoint=saved(20, bytes=number)).settle()
    assert (kept(cluster), cluster.status["progress"]["step"]) == (10, 12)


# What comes of a failure


def test_out_of_memory_goes_on_from_the_checkpoint_with_half_the_micro_batch_and_the_same_global_batch() -> None:
    cluster = training({"training.microBatchSize": 4, "training.globalBatchSize": 8}, step=12, checkpoint=saved(10))
    cluster.outcome(failed(FailureClass.OUT_OF_MEMORY)).ended().settle()
    cluster.wait(600).settle()
    plan = json.loads(cluster.objects[CONFIG_MAP, "example-2-plan"]["data"]["plan.json"])
    assert (plan["batch"]["microBatchSize"], plan["batch"]["globalBatchSize"]) == (2, 8)
    assert plan["checkpoint"]["resume"] is True
    cluster.running().report(step=11, resumed_from_step=10, checkpoint=saved(10)).settle()
    assert cluster.attempt["resumedFromStep"] == 10


def attempts_that_save_nothing(cluster: Cluster) -> Cluster:
    """Three more, each of which goes on after step 10 and comes one step further than the one before."""
    for step in (13, 14, 15):
        next_attempt(cluster, step, resumed_from_step=10, checkpoint=saved(10))
    cluster.outcome(failed(FailureClass.NODE_LOST)).ended().settle()
    return cluster


def test_steps_that_the_next_attempt_does_again_are_no_progress() -> None:
    cluster = training({"failurePolicy": {"maxRestarts": 100}}, step=12, checkpoint=saved(10))
    attempts_that_save_nothing(cluster)
    assert cluster.holds("Failed") == ("True", "NoProgress")
    assert "left no newer checkpoint" in cluster.says("Failed")


def test_a_job_whose_attempts_begin_at_the_beginning_counts_steps() -> None:
    never = {"everySteps": 10, "resume": "never"}
    cluster = training({"failurePolicy": {"maxRestarts": 100}, "checkpoint": never}, step=2)
    for step in (3, 4, 5):
        next_attempt(cluster, step)
    cluster.outcome(failed(FailureClass.NODE_LOST)).ended().settle()
    assert cluster.holds("Failed") is None


# Suspension


def test_suspending_asks_the_trainers_to_save_and_to_stop_and_waits_for_them() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    decision = cluster.spec(suspend=True).settle()
    assert cluster.stop_asked == "1"
    assert (cluster.named(RAY_JOB), decision.requeue_after) == (["example-1"], 60)
    assert (cluster.status["phase"], cluster.holds("Suspended")) == ("Running", ("False", "Suspending"))
    assert "asked to save" in cluster.says("Suspended")
    cluster.wait(20).report(step=15, checkpoint=saved(15)).settle()
    assert cluster.named(RAY_JOB) == ["example-1"]
    cluster.wait(5).report(Stage.DONE, step=15, checkpoint=saved(15)).outcome(stopped(15)).settle()
    assert (cluster.named(RAY_JOB), cluster.status["phase"]) == ([], "Suspended")
    assert (cluster.attempt["outcome"], cluster.attempt["step"], kept(cluster)) == ("Suspended", 15, 15)
    assert cluster.attempt["message"] == "spec.suspend was set to true. Step 15 is saved."
    assert (cluster.status["restarts"], cluster.status["preemptions"]) == (0, 0)


def test_trainers_that_do_not_answer_are_suspended_when_their_time_is_over() -> None:
    cluster = training({"lifecycle": {"suspendGraceSeconds": 30}}, step=12, checkpoint=saved(10))
    cluster.spec(suspend=True).settle()
    cluster.wait(29).settle()
    assert cluster.named(RAY_JOB) == ["example-1"]
    cluster.wait(1).settle()
    assert (cluster.named(RAY_JOB), cluster.status["phase"]) == ([], "Suspended")
    assert "did not in time. Step 10 is saved." in cluster.attempt["message"]


def test_the_wish_is_written_once_and_the_wait_costs_no_writes() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    decision = cluster.spec(suspend=True).step()
    assert [one.patch for one in decision.merge] == [{"data": {"stop-attempt": "1"}}]
    decision = cluster.wait(10).step()
    assert (decision.merge, decision.status) == ((), None)


def test_a_wish_that_got_lost_is_written_again() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.spec(suspend=True)
    decision = cluster.decide()
    cluster.apply(type(decision)(**{**vars(decision), "merge": ()}))
    cluster.settle()
    assert cluster.stop_asked == "1"


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint": None}, {"lifecycle": {"suspendGraceSeconds": 0}}],
    ids=["a job without checkpoints", "no time is given"],
)
def test_a_job_that_is_not_to_be_waited_for_is_suspended_at_once(changes: dict[str, Any]) -> None:
    cluster = training(changes)
    cluster.spec(suspend=True).settle()
    assert (cluster.named(RAY_JOB), cluster.status["phase"], cluster.stop_asked) == ([], "Suspended", None)


@pytest.mark.parametrize("where", ["starting", "queued", "ended", "without its ConfigMap"])
def test_an_attempt_that_cannot_save_is_suspended_at_once(where: str) -> None:
    cluster = Cluster(SAVES | ({"scheduling": {"queue": "team"}} if where == "queued" else {}))
    cluster.settle()
    if where == "starting":
        cluster.running().report(Stage.LOADING_MODEL).settle()
    if where in ("ended", "without its ConfigMap"):
        cluster.running().wait(60).report(step=3).settle()
    if where == "ended":
        cluster.ended()
    if where == "without its ConfigMap":
        cluster.delete(CONFIG_MAP, "example-progress")
    cluster.spec(suspend=True).settle()
    assert (cluster.named(RAY_JOB), cluster.status["phase"]) == (["example-1"] if where == "ended" else [], "Suspended")
    assert "stopAskedAt" not in cluster.attempt


def test_a_success_while_it_was_asked_to_stop_is_a_success() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.spec(suspend=True).settle()
    cluster.outcome(succeeded()).ended("SUCCEEDED").settle()
    assert cluster.status["phase"] == "Succeeded"


def test_a_failure_while_it_was_asked_to_stop_ends_it_as_suspended() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.spec(suspend=True).settle()
    cluster.outcome(failed(FailureClass.OUT_OF_MEMORY)).ended().settle()
    assert (cluster.attempt["outcome"], cluster.status["phase"]) == ("Suspended", "Suspended")
    assert cluster.status["restarts"] == 0


def test_an_attempt_that_was_asked_to_stop_ends_although_the_job_is_suspended_no_longer() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.spec(suspend=True).settle()
    cluster.spec(suspend=False).settle()
    assert (cluster.named(RAY_JOB), cluster.holds("Suspended")) == (["example-1"], ("False", "Suspending"))
    # Told to stop by no person, says KubeRay; it is no preemption all the same.
    cluster.wait(20).report(step=15, checkpoint=saved(15)).outcome(stopped(15)).ended(message="exit code 130").settle()
    cluster.wait(5).settle()
    assert [one.get("outcome") for one in cluster.status["attempts"]] == ["Suspended", None]
    assert (cluster.status["preemptions"], cluster.status["restarts"], kept(cluster)) == (0, 0, 15)
    assert cluster.named(RAY_JOB) == ["example-2"]


def test_the_next_attempt_is_not_asked_what_the_one_before_was() -> None:
    cluster = training(step=12, checkpoint=saved(10))
    cluster.spec(suspend=True).settle()
    cluster.report(step=15, checkpoint=saved(15)).outcome(stopped(15)).settle()
    cluster.spec(suspend=False).settle()
    cluster.running().wait(60).report(step=16, resumed_from_step=15, checkpoint=saved(15)).settle()
    assert (cluster.attempt["resumedFromStep"], cluster.stop_asked) == (15, "1")
    cluster.spec(suspend=True).settle()
    assert cluster.stop_asked == "2"
