"""A small cluster for tests of decisions: one job, a clock, and a KubeRay and trainers that do as they are told.

    cluster = Cluster({"failurePolicy": {"maxRestarts": 1}})
    cluster.settle()                               until nothing changes any more
    cluster.kuberay(jobDeploymentStatus="Running", jobStatus="RUNNING")
    cluster.report(Stage.TRAINING, step=3)
    cluster.wait(60).settle()
    cluster.status["phase"]

`apply` carries out a decision as the reconcile pass does: what is created, what is deleted, the status. The job has
the defaults that the API server fills in. Nothing here reads a clock.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.failures import Failure, FailureClass
from finetune_api.progress import Artifact, Outcome, Progress, Result, SavedCheckpoint, Stage
from finetune_operator import names
from finetune_operator.decide import Decision, decide
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, RAY_JOB, Kind
from finetune_operator.observe import World, observe
from finetune_operator.settings import Settings
from finetune_operator.states import STOP_KEY
from finetune_operator.times import written
from tests.factories import job, job_document, runtime_document

__all__ = [
    "ARTIFACT",
    "NOON",
    "SETTINGS",
    "Cluster",
    "another_job",
    "break_attempt",
    "failed",
    "saved",
    "started",
    "stopped",
    "succeeded",
]

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SETTINGS = Settings(pod_name="test")
ARTIFACT = Artifact(uri="file:///runs/model", kind="model", digest="b3", bytes=10)
WATCHED = (RAY_JOB, CONFIG_MAP)
Document = dict[str, Any]


def succeeded(step: int = 10, **changes: Any) -> Outcome:
    """The trainers' account of a success."""
    return Outcome(**({"result": Result.SUCCEEDED, "step": step, "total_steps": 10, "artifacts": [ARTIFACT]} | changes))


def failed(kind: FailureClass, message: str = "it broke", step: int = 0) -> Outcome:
    """The trainers' account of a failure."""
    return Outcome(result=Result.FAILED, failure=Failure(failure_class=kind, message=message, step=step), step=step)


def stopped(step: int = 0) -> Outcome:
    """The trainers' account of having been told to stop."""
    return Outcome(result=Result.CANCELLED, step=step)


def saved(step: int, **changes: Any) -> SavedCheckpoint:
    """A whole checkpoint of so many steps."""
    return SavedCheckpoint(
        **{"uri": f"pvc://runs/step-{step}", "step": step, "saved_at": NOON, "world_size": 2, "bytes": 1000} | changes
    )


def another_job(name: str, status: Mapping[str, Any] | None = None) -> Document:
    """A FineTuneJob that the one under test may depend on: it trains a whole model."""
    document = job_document({"tuning": {"full": {}}}, name=name)
    return document | {"status": dict(status)} if status is not None else document


class Cluster:
    """All that there is, the clock included."""

    def __init__(self, changes: Mapping[str, Any] | None = None, name: str = "example") -> None:
        """`changes` to the default job, by dotted path below spec."""
        self.now = NOON
        self._name = name
        self._last_uid = 0
        document = job(changes, name).to_document()
        metadata = {"name": name, "namespace": "team", "uid": self._uid(), "generation": 1, "resourceVersion": "1"}
        self.job: Document | None = {**document, "metadata": metadata}
        self.runtime: Document | None = None
        self.objects: dict[tuple[Kind, str], Document] = {}
        self.pods: list[Document] = []
        self.dependencies: dict[str, Document | None] = {}
        self.events: list[str] = []
        self.one_machine = True
        """So that no job needs a runtime with a storage."""
        self.finalized = False
        """RayJobs that are deleted stay until `let_go`, as KubeRay's finalizer has it."""

    # What the operator sees and does

    def world(self) -> World:
        """What there is now, as stores would show it; later changes do not reach it."""
        assert self.job is not None
        children: dict[Kind, list[Document]] = {kind: [] for kind in WATCHED}
        for (kind, _), document in self.objects.items():
            if kind in children and names.job_of(document["metadata"].get("labels")) == self.job["metadata"]["name"]:
                children[kind].append(document)
        seen = World(self.job, self.runtime, children, self.pods, self.dependencies, self.one_machine)
        return copy.deepcopy(seen)

    def decide(self, world: World | None = None) -> Decision:
        """The decision on what there is, or on an older `world`."""
        seen = world if world is not None else self.world()
        return decide(seen.job, observe(seen), self.now, SETTINGS)

    def apply(self, decision: Decision, world: World | None = None) -> bool:
        """Carries `decision` out; False when the status was refused because it was decided on an older job."""
        for create in decision.create:
            name = create.document["metadata"]["name"]
            if (create.kind, name) not in self.objects:
                self.create(create.kind, create.document)
        for delete in decision.delete:
            assert self.job is not None
            if delete.kind == FINETUNE_JOB:
                self.delete_job()
                return True
            there = self.objects.get((delete.kind, delete.key.name))
            if there is not None and delete.uid in (None, there["metadata"]["uid"]):
                self.delete(delete.kind, delete.key.name)
        if self.job is None:
            return True
        if decision.status is None:
            self._merge(decision)
            return True
        if world is not None and world.job["metadata"]["resourceVersion"] != self.job["metadata"]["resourceVersion"]:
            return False
        # By way of JSON: what cannot be written as JSON cannot be written.
        self._change_job({"status": json.loads(json.dumps(decision.status))})
        self.events += [event.reason for event in decision.events]
        self._merge(decision)
        return True

    def step(self) -> Decision:
        """One pass."""
        decision = self.decide()
        self.apply(decision)
        return decision

    def settle(self, passes: int = 8) -> Decision:
        """Passes until one changes nothing; fails when they never end."""
        decision = Decision()
        for _ in range(passes):
            if self.job is None:
                return Decision()
            decision = self.step()
            if not (decision.create or decision.delete or decision.status or decision.merge):
                return decision
        raise AssertionError(f"still changing after {passes} passes: {decision}")

    # What a person does

    def spec(self, **changes: Any) -> Cluster:
        """Changes the spec; the generation goes up."""
        assert self.job is not None
        self.job["metadata"]["generation"] += 1
        self._change_job({"spec": {**self.job["spec"], **changes}})
        return self

    def delete(self, kind: Kind, name: str) -> None:
        """Deletes an object; a RayJob of which `finalized` holds stays a while."""
        if kind == RAY_JOB and self.finalized:
            self.objects[kind, name]["metadata"]["deletionTimestamp"] = written(self.now)
            return
        del self.objects[kind, name]
        if kind == RAY_JOB:
            number = names.attempt_from(name.rsplit("-", 1)[-1])
            self.pods = [pod for pod in self.pods if names.attempt_of(pod["metadata"]["labels"]) != number]

    def delete_job(self) -> None:
        """The job goes, and all that it owns."""
        self.job = None
        self.objects.clear()
        self.pods.clear()

    def create(self, kind: Kind, document: Document) -> Document:
        """Creates an object."""
        created = copy.deepcopy(document)
        created["metadata"] |= {"uid": self._uid(), "creationTimestamp": written(self.now)}
        self.objects[kind, created["metadata"]["name"]] = created
        return created

    def foreign(self, kind: Kind, name: str) -> Document:
        """An object of somebody else, with the job's label on it."""
        assert self.job is not None
        labels = names.job_labels(self.job["metadata"]["name"])
        return self.create(kind, {"metadata": {"name": name, "namespace": "team", "labels": labels}, "spec": {}})

    def use_runtime(self, changes: Mapping[str, Any] | None = None) -> Cluster:
        """The runtime that the job names comes to be, or is changed."""
        self.runtime = runtime_document(changes)
        return self

    # What KubeRay, the kubelet and the trainers do

    def kuberay(self, attempt: int | None = None, suspend: bool | None = None, **status: Any) -> Cluster:
        """KubeRay writes the status of an attempt's RayJob; a queue sets its spec.suspend."""
        ray_job = self.ray_job(attempt)
        ray_job["status"] = {**ray_job.get("status", {}), **status}
        if suspend is not None:
            ray_job["spec"]["suspend"] = suspend
        return self

    def running(self) -> Cluster:
        """The Ray cluster is up and the entrypoint runs."""
        return self.kuberay(jobDeploymentStatus="Running", jobStatus="RUNNING", startTime=written(self.now))

    def ended(self, status: str = "FAILED", message: str = "", reason: str = "AppFailed") -> Cluster:
        """The entrypoint has ended."""
        deployment = "Failed" if status == "FAILED" else "Complete"
        why: dict[str, Any] = {"reason": reason} if status == "FAILED" else {}
        return self.kuberay(
            jobDeploymentStatus=deployment, jobStatus=status, message=message, endTime=written(self.now), **why
        )

    def report(self, stage: Stage = Stage.TRAINING, step: int = 0, attempt: int | None = None, **more: Any) -> Cluster:
        """The trainers say how far they are. How many steps there are is told once they train."""
        if stage in (Stage.TRAINING, Stage.EVALUATING, Stage.EXPORTING):
            more = {"total_steps": 10, **more}
        progress = Progress(stage=stage, step=step, updated_at=self.now, **more)
        return self._report("progress.json", progress.model_dump_json(by_alias=True), attempt)

    def outcome(self, outcome: Outcome, attempt: int | None = None) -> Cluster:
        """The trainers say how it ended."""
        return self._report("outcome.json", outcome.model_dump_json(by_alias=True), attempt)

    def pod(
        self, name: str, status: Mapping[str, Any], role: str = names.WORKER, attempt: int | None = None
    ) -> Cluster:
        """A pod of an attempt, with this status."""
        assert self.job is not None
        number = attempt or self.attempt["number"]
        labels = names.pod_labels(self.job["metadata"]["name"], number, role)
        metadata = {"name": name, "namespace": "team", "uid": self._uid(), "labels": labels}
        self.pods = [pod for pod in self.pods if pod["metadata"]["name"] != name]
        self.pods.append({"metadata": metadata, "spec": {}, "status": dict(status)})
        return self

    def let_go(self) -> Cluster:
        """KubeRay takes its finalizer off the RayJobs that are being deleted."""
        for kind, name in list(self.objects):
            if kind == RAY_JOB and "deletionTimestamp" in self.objects[kind, name]["metadata"]:
                del self.objects[kind, name]
        return self

    def wait(self, seconds: float) -> Cluster:
        """Time passes."""
        self.now += timedelta(seconds=seconds)
        return self

    # What can be looked at

    @property
    def status(self) -> Document:
        """The job's status."""
        assert self.job is not None
        status: Document = self.job.get("status", {})
        return status

    @property
    def stop_asked(self) -> str | None:
        """The attempt that is asked to save and to stop, as its trainers see it."""
        assert self.job is not None
        config_map = self.objects[CONFIG_MAP, names.progress_config_map(self.job["metadata"]["name"])]
        found: str | None = (config_map.get("data") or {}).get(STOP_KEY)
        return found

    @property
    def attempt(self) -> Document:
        """The newest attempt in the status."""
        attempt: Document = self.status["attempts"][-1]
        return attempt

    def ray_job(self, attempt: int | None = None) -> Document:
        """The RayJob of an attempt, by default the newest that the status knows."""
        assert self.job is not None
        name = names.ray_job(self.job["metadata"]["name"], attempt) if attempt else self.attempt["rayJob"]
        return self.objects[RAY_JOB, name]

    def named(self, kind: Kind) -> list[str]:
        """Names of all objects of a kind."""
        return sorted(name for found, name in self.objects if found == kind)

    def holds(self, condition: str) -> tuple[str, str] | None:
        """Status and reason of a condition."""
        return next(((c["status"], c["reason"]) for c in self.status["conditions"] if c["type"] == condition), None)

    def says(self, condition: str) -> str:
        """Message of a condition."""
        return str(next(c["message"] for c in self.status["conditions"] if c["type"] == condition))

    def _report(self, key: str, text: str, attempt: int | None) -> Cluster:
        assert self.job is not None
        config_map = self.objects[CONFIG_MAP, names.progress_config_map(self.job["metadata"]["name"])]
        number = str(attempt or self.attempt["number"])
        data = config_map.get("data") or {}
        if data.get("attempt") != number:
            data = {key: value for key, value in data.items() if key == STOP_KEY}
        config_map["data"] = {**data, "attempt": number, key: text}
        return self

    def _merge(self, decision: Decision) -> None:
        for one in decision.merge:
            there = self.objects.get((one.kind, one.key.name))
            if there is not None:
                there["data"] = {**(there.get("data") or {}), **one.patch["data"]}

    def _change_job(self, change: Document) -> None:
        assert self.job is not None
        version = str(int(self.job["metadata"]["resourceVersion"]) + 1)
        self.job = {**self.job, **change, "metadata": {**self.job["metadata"], "resourceVersion": version}}

    def _uid(self) -> str:
        self._last_uid += 1
        return f"{self._name}-uid-{self._last_uid}"


def started(changes: dict[str, Any] | None = None) -> Cluster:
    """A job whose first attempt trains."""
    cluster = Cluster(changes)
    cluster.settle()
    cluster.running().wait(60).report(step=1).settle()
    return cluster


def break_attempt(cluster: Cluster, kind: FailureClass = FailureClass.NODE_LOST, step: int = 1) -> Cluster:
    """The attempt that goes on fails."""
    cluster.outcome(failed(kind, step=step)).ended(message="exit code 1")
    cluster.settle()
    return cluster
