"""Events in any order: whatever happens to a job, decisions converge, and nothing goes backwards.

The rules are what can happen in a cluster: KubeRay and a queue do their work, trainers report or die, pods vanish,
people change, suspend and delete things, clocks jump, and the operator looks at worlds that are old or half old. The
invariants are what a user is promised. With FINETUNE_LONG=1 many more runs are made.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from finetune_api.failures import FailureClass
from finetune_api.progress import Stage
from finetune_operator import names
from finetune_operator.decide import Decision
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB
from finetune_operator.observe import World
from finetune_operator.states import RayJobState, read_ray_job
from tests.operator.decide_factories import Cluster, Document, another_job, failed, saved, stopped, succeeded

LONG = bool(os.environ.get("FINETUNE_LONG"))

JOBS: list[dict[str, Any]] = [
    {},
    {"runtimeRef": {"name": "pool"}},
    {"scheduling": {"queue": "team"}},
    {"model.source": "job://sft"},
    {"failurePolicy": {"maxRestarts": 1, "rules": [{"classes": ["Unknown"], "action": "Suspend"}]}},
    {"failurePolicy": {"maxRestarts": 2, "maxPreemptions": 2, "hangTimeoutSeconds": 60}},
    {"lifecycle": {"activeDeadlineSeconds": 5000, "startDeadlineSeconds": 300, "ttlSecondsAfterFinished": 100}},
    {"lifecycle": {"keepFailedClusterSeconds": 600}, "training.microBatchSize": 8, "training.globalBatchSize": 16},
    {"checkpoint": {"everySteps": 5}, "failurePolicy": {"maxRestarts": 50}},
    {"checkpoint": {"resume": "never"}, "scheduling": {"queue": "team"}, "lifecycle": {"suspendGraceSeconds": 300}},
]
DEPLOYMENTS = ["", "Initializing", "Running", "Suspending", "Suspended", "Complete", "Failed", "ValidationFailed"]
JOB_STATUSES = ["", "PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
PODS: list[dict[str, Any]] = [
    {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": "no GPUs"}]},
    {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    {"phase": "Failed", "reason": "Evicted", "message": "disk pressure"},
    {"phase": "Failed", "containerStatuses": [{"name": "ray", "state": {"terminated": {"reason": "OOMKilled"}}}]},
    {
        "phase": "Failed",
        "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
    },
]
OUTCOMES = st.one_of(
    st.just(succeeded()),
    st.just(stopped()),
    st.builds(failed, st.sampled_from(FailureClass), step=st.integers(0, 50)),
)
GROWING = ("observedGeneration", "restarts", "preemptions", "activeSeconds")


class Life(RuleBasedStateMachine):
    """One job, and all that may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()
        self.photographs: list[World] = []
        self.before: Document = {}

    @initialize(changes=st.sampled_from(JOBS), finalized=st.booleans())
    def create_job(self, changes: dict[str, Any], finalized: bool) -> None:
        self.cluster = Cluster(changes)
        self.cluster.finalized = finalized

    @property
    def exists(self) -> bool:
        return self.cluster.job is not None

    @property
    def has_ray_job(self) -> bool:
        return self.exists and bool(self.cluster.named(RAY_JOB))

    # The operator

    @precondition(lambda self: self.exists)
    @rule()
    def a_pass(self) -> None:
        decision = self.cluster.decide()
        creates = [one for one in decision.create if one.kind == RAY_JOB]
        active = self.active()
        assert not (creates and active), f"{creates[0].document['metadata']['name']} beside {active}"
        self.cluster.apply(decision)
        self.check_status(decision)

    @precondition(lambda self: self.exists)
    @rule()
    def passes_until_nothing_changes(self) -> None:
        decision = self.settle()
        assert len([one for one in self.active() if not one.deleting]) <= 1
        if self.exists:
            again = self.cluster.decide()
            assert (again.create, again.delete, again.status, again.events, again.merge) == ((), (), None, (), ())
            assert decision == again

    @precondition(lambda self: self.exists)
    @rule()
    def look(self) -> None:
        self.photographs = [*self.photographs[-3:], self.cluster.world()]

    @precondition(lambda self: self.exists and self.photographs)
    @rule(data=st.data())
    def a_pass_over_an_old_world(self, data: st.DataObject) -> None:
        """As a leader does that does not know yet that it is none: its status is refused, what it does is not."""
        old = self.some_photograph(data)
        decision = self.cluster.decide(old)
        if self.cluster.apply(decision, old):
            self.check_status(decision)

    @precondition(lambda self: self.exists and self.photographs)
    @rule(data=st.data(), kinds=st.sets(st.sampled_from([RAY_JOB, CONFIG_MAP]), min_size=1))
    def a_pass_over_a_half_old_world(self, data: st.DataObject, kinds: set[Any]) -> None:
        """Watches of different kinds are not equally quick. The present RayJob is looked up, as the pass does."""
        old, now = self.some_photograph(data), self.cluster.world()
        if old.job["metadata"]["uid"] != now.job["metadata"]["uid"]:
            return
        children = {kind: old.children[kind] if kind in kinds else now.children[kind] for kind in now.children}
        if RAY_JOB in kinds:
            present = {one["metadata"]["name"]: one for one in now.children[RAY_JOB]}
            shown = [one for one in children[RAY_JOB] if one["metadata"]["name"] in present]
            missing = [present[name] for name in present if name not in {one["metadata"]["name"] for one in shown}]
            children[RAY_JOB] = [*shown, *missing]
        world = World(now.job, old.runtime, children, old.pods, now.dependencies)
        decision = self.cluster.decide(world)
        if self.cluster.apply(decision, world):
            self.check_status(decision)

    # KubeRay, the queue, the kubelet

    @precondition(lambda self: self.has_ray_job)
    @rule(data=st.data(), deployment=st.sampled_from(DEPLOYMENTS), status=st.sampled_from(JOB_STATUSES))
    def kuberay_writes(self, data: st.DataObject, deployment: str, status: str) -> None:
        ray_job = self.some_ray_job(data)
        if not read_ray_job(ray_job).finished:
            ray_job["status"] = {"jobDeploymentStatus": deployment, "jobStatus": status, "message": "exit code 1"}

    @precondition(lambda self: self.has_ray_job)
    @rule(data=st.data())
    def the_cluster_comes_up(self, data: st.DataObject) -> None:
        ray_job = self.some_ray_job(data)
        if not read_ray_job(ray_job).finished:
            ray_job["spec"]["suspend"] = False
            ray_job["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}

    @precondition(lambda self: self.has_ray_job)
    @rule(data=st.data(), suspend=st.booleans())
    def the_queue_decides(self, data: st.DataObject, suspend: bool) -> None:
        ray_job = self.some_ray_job(data)
        if not read_ray_job(ray_job).finished:
            ray_job["spec"]["suspend"] = suspend

    @rule()
    def kuberay_lets_go(self) -> None:
        self.cluster.let_go()

    @precondition(lambda self: self.exists and self.cluster.status.get("attempts"))
    @rule(status=st.sampled_from(PODS), role=st.sampled_from([names.HEAD, names.WORKER]))
    def a_pod_is_seen(self, status: dict[str, Any], role: str) -> None:
        self.cluster.pod(f"pod-{role}", status, role)

    @rule()
    def pods_vanish(self) -> None:
        self.cluster.pods.clear()

    # The trainers

    @precondition(lambda self: self.can_report)
    @rule(stage=st.sampled_from(Stage), step=st.integers(0, 50), data=st.data())
    def trainers_report(self, stage: Stage, step: int, data: st.DataObject) -> None:
        self.cluster.report(stage, step, attempt=self.some_attempt(data))

    @precondition(lambda self: self.can_report)
    @rule(begun=st.none() | st.integers(0, 50), more=st.none() | st.integers(0, 20), rejected=st.integers(0, 2))
    def trainers_go_on_and_save(self, begun: int | None, more: int | None, rejected: int) -> None:
        """After `begun` steps, in `more` of which there is a checkpoint."""
        step = (begun or 0) + (more or 0)
        checkpoint = saved(step, saved_at=self.cluster.now) if begun or more else None
        reasons = [f"step-{number}: damaged" for number in range(rejected)]
        self.cluster.report(step=step, resumed_from_step=begun, checkpoint=checkpoint, rejected_checkpoints=reasons)

    @precondition(lambda self: self.can_report and self.cluster.stop_asked)
    @rule(step=st.integers(0, 50))
    def trainers_save_and_stop_as_they_were_asked(self, step: int) -> None:
        self.cluster.report(Stage.DONE, step, checkpoint=saved(step)).outcome(stopped(step))

    @precondition(lambda self: self.can_report)
    @rule(outcome=OUTCOMES, data=st.data())
    def trainers_end(self, outcome: Any, data: st.DataObject) -> None:
        self.cluster.outcome(outcome, attempt=self.some_attempt(data))

    @precondition(lambda self: self.can_report and self.cluster.attempt["rayJob"] in self.cluster.named(RAY_JOB))
    @rule(kind=st.sampled_from(FailureClass), step=st.integers(0, 50))
    def an_attempt_runs_and_fails(self, kind: FailureClass, step: int) -> None:
        """All at once, so that a run gets to its later attempts."""
        self.cluster.kuberay(suspend=False, jobDeploymentStatus="Running", jobStatus="RUNNING")
        self.cluster.report(Stage.TRAINING, step).wait(30)
        self.settle()
        if self.can_report and self.cluster.attempt["rayJob"] in self.cluster.named(RAY_JOB):
            self.cluster.outcome(failed(kind, step=step)).ended()
            self.settle()
            self.cluster.wait(600)

    # People

    @precondition(lambda self: self.exists)
    @rule(suspend=st.booleans())
    def somebody_suspends(self, suspend: bool) -> None:
        self.cluster.spec(suspend=suspend)

    @precondition(lambda self: self.exists)
    @rule(seconds=st.sampled_from([0, 60, 600]))
    def somebody_changes_the_deadline(self, seconds: int) -> None:
        """Zero seconds are no deadline, and so not valid."""
        assert self.cluster.job is not None
        self.cluster.spec(lifecycle={**self.cluster.job["spec"]["lifecycle"], "startDeadlineSeconds": seconds})

    @precondition(lambda self: self.exists and self.cluster.objects)
    @rule(data=st.data())
    def somebody_deletes_an_object(self, data: st.DataObject) -> None:
        kind, name = data.draw(st.sampled_from(sorted(self.cluster.objects, key=str)))
        self.cluster.delete(kind, name)

    @precondition(lambda self: self.can_report)
    @rule(value=st.sampled_from([None, {}, {"attempt": "1", "progress.json": "?"}, {"attempt": "x"}]))
    def somebody_edits_the_progress(self, value: Any) -> None:
        assert self.cluster.job is not None
        self.cluster.objects[CONFIG_MAP, names.progress_config_map(self.cluster.job["metadata"]["name"])]["data"] = (
            value
        )

    @precondition(lambda self: self.exists)
    @rule(number=st.integers(1, 4))
    def somebody_takes_a_name(self, number: int) -> None:
        name = names.ray_job("example", number)
        if (RAY_JOB, name) not in self.cluster.objects:
            self.cluster.foreign(RAY_JOB, name)["status"] = {"jobDeploymentStatus": "Complete"}

    @rule()
    def names_are_freed(self) -> None:
        for kind, name in list(self.cluster.objects):
            if "ownerReferences" not in self.cluster.objects[kind, name]["metadata"]:
                del self.cluster.objects[kind, name]

    @rule(changes=st.sampled_from([None, {}, {"image": "trainer:2"}, {"workers": {"gpus": -1}}]))
    def the_runtime_changes(self, changes: dict[str, Any] | None) -> None:
        self.cluster.runtime = None
        if changes is not None:
            self.cluster.use_runtime(changes)

    @rule(kind=st.sampled_from([None, "", "Complete", "Failed"]))
    def the_other_job_changes(self, kind: str | None) -> None:
        artifacts = [{"uri": "file:///m", "kind": "model", "digest": "b3", "bytes": 1}]
        conditions = [{"type": kind, "status": "True", "reason": "R", "message": "M"}] if kind else []
        other = another_job("sft", {"conditions": conditions, "artifacts": artifacts})
        self.cluster.dependencies["sft"] = None if kind is None else other

    @rule(seconds=st.sampled_from([1, 10, 60, 301, 4000, 100_000, -30, -5000]))
    def time_passes(self, seconds: int) -> None:
        self.cluster.wait(seconds)

    # What is promised

    @invariant()
    def the_status_is_one_that_the_crd_takes(self) -> None:
        status = self.cluster.status if self.exists else {}
        assert len(status.get("attempts", [])) <= 10
        assert len(status.get("conditions", [])) <= 16

    def teardown(self) -> None:
        """When nothing more happens, the job ends, or waits for somebody and says for whom."""
        for _ in range(60):
            if not self.exists:
                return
            self.settle()
            self.cluster.let_go()
            decision = self.settle()
            if decision.requeue_after is None or self.is_taken():
                break
            self.cluster.wait(decision.requeue_after)
        status = self.cluster.status if self.exists else {}
        event(f"{len(status.get('attempts', []))} attempts, {self.cluster.holds('Failed') if status else 'deleted'}")
        if not self.exists or status.get("finishedAt"):
            return
        assert self.waits(status), f"{status['phase']}: {status['conditions']}"

    def waits(self, status: Document) -> bool:
        if status["phase"] in ("Suspended", "Queued"):
            return True
        return status["phase"] == "Pending" and (
            self.is_taken()
            or self.cluster.holds("Admitted") == ("False", "DependencyPending")
            or self.cluster.holds("Valid") not in (("True", "Accepted"), None)
        )

    # Helpers

    @property
    def can_report(self) -> bool:
        there = (CONFIG_MAP, names.progress_config_map("example")) in self.cluster.objects
        return self.exists and there and bool(self.cluster.status.get("attempts"))

    def is_taken(self) -> bool:
        return self.exists and self.cluster.holds("ClusterReady") == ("False", "NameTaken")

    def active(self) -> list[RayJobState]:
        assert self.cluster.job is not None or not self.cluster.objects
        uid = self.cluster.job["metadata"]["uid"] if self.cluster.job is not None else ""
        ray_jobs = (read_ray_job(one) for (kind, _), one in self.cluster.objects.items() if kind == RAY_JOB)
        return [one for one in ray_jobs if one.owner_uid == uid and not one.finished]

    def some_ray_job(self, data: st.DataObject) -> Document:
        return self.cluster.objects[RAY_JOB, data.draw(st.sampled_from(self.cluster.named(RAY_JOB)))]

    def some_photograph(self, data: st.DataObject) -> World:
        return self.photographs[data.draw(st.integers(0, len(self.photographs) - 1))]

    def some_attempt(self, data: st.DataObject) -> int:
        newest: int = self.cluster.attempt["number"]
        return data.draw(st.sampled_from([newest, newest, newest, max(1, newest - 1)]))

    def settle(self) -> Decision:
        decision = Decision()
        for _ in range(10):
            if not self.exists:
                return decision
            decision = self.cluster.decide()
            self.cluster.apply(decision)
            self.check_status(decision)
            if not (decision.create or decision.delete or decision.status or decision.merge):
                return decision
        raise AssertionError(f"does not settle: {decision}")

    def check_status(self, decision: Decision) -> None:
        """Compares what was just written with what stood before."""
        if decision.status is None or not self.exists:
            return
        before, after = self.before, decision.status
        assert "InternalError" not in {one["reason"] for one in after["conditions"]}, after["conditions"]
        for name in GROWING:
            assert after.get(name, 0) >= before.get(name, 0), name
        assert self.numbers(after)[-1:] >= self.numbers(before)[-1:]
        assert self.numbers(after) == sorted(set(self.numbers(after)))
        assert sum("endedAt" not in one for one in after["attempts"]) <= 1
        assert not before.get("artifacts") or after["artifacts"] == before["artifacts"]
        assert before.get("finishedAt") in (None, after.get("finishedAt"))
        ended = {one["number"]: one for one in before.get("attempts", []) if "endedAt" in one}
        assert all(ended.get(one["number"], one) == one for one in after["attempts"])
        self.check_checkpoint(before, after)
        self.check_times(after)
        self.before = after

    def check_checkpoint(self, before: Document, after: Document) -> None:
        """The newest checkpoint goes back only by news of trainers that began before it."""
        was, now = (status.get("checkpoint", {}).get("step", -1) for status in (before, after))
        if now >= was:
            return
        known = {one["number"]: one.get("resumedFromStep") for one in before.get("attempts", [])}
        last = after["attempts"][-1]
        begins = known.get(last["number"]) is None and last["resumedFromStep"] < was
        assert begins or _time(after["progress"]["updatedAt"]) > _time(before["progress"]["updatedAt"])

    def check_times(self, status: Document) -> None:
        for one in status["attempts"]:
            if "endedAt" in one:
                assert _time(one["endedAt"]) >= _time(one["createdAt"])

    @staticmethod
    def numbers(status: Document) -> list[int]:
        return [one["number"] for one in status.get("attempts", [])]


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


Life.TestCase.settings = settings(
    max_examples=2000 if LONG else 60,
    stateful_step_count=50 if LONG else 30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLife = Life.TestCase
