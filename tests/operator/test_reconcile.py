"""Whole passes over a cluster in memory: what is done in which order, on what knowledge, and when it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.progress import Result
from finetune_operator.errors import ApiError, ClusterError, Conflict, Forbidden, Invalid, TooManyRequests, Unreachable
from finetune_operator.kinds import (
    CONFIG_MAP,
    EVENT,
    FINETUNE_JOB,
    FINETUNE_RUNTIME,
    RAY_JOB,
    ROLE,
    SERVICE_ACCOUNT,
    Key,
)
from finetune_operator.reconcile import PROGRESS_SECONDS, Reconciler
from finetune_operator.settings import Settings
from tests.factories import job_document, runtime_document
from tests.operator.runtime.virtual_time import run
from tests.operator.stage import NAMESPACE, Asked, Stage, now, play

KEY = Key(NAMESPACE, "example")
SECOND_ATTEMPT_SECONDS = 15
"""The first back-off is 10 s."""


async def until_running(stage: Stage, attempt: int = 1) -> None:
    await asyncio.sleep(1)
    await stage.kuberay(f"example-{attempt}", "Running", "RUNNING")
    await stage.report("example", attempt, step=1)
    await asyncio.sleep(1)
    assert stage.status()["phase"] == "Running"


def config_map(name: str, **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": NAMESPACE, **metadata}}


def ray_job(name: str, **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name, "namespace": NAMESPACE, **metadata}}


def test_a_job_becomes_a_ray_job_whose_end_becomes_its_own() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await asyncio.sleep(1)
        assert stage.names(RAY_JOB) == ["example-1"]
        assert {"example-1-plan", "example-progress"} <= set(stage.names(CONFIG_MAP))
        assert stage.names(SERVICE_ACCOUNT) == ["example-trainer"]
        attempt = stage.status()["attempts"][-1]
        found = await stage.there.get(RAY_JOB, Key(NAMESPACE, "example-1"))
        assert found is not None
        assert (attempt["number"], attempt["uid"]) == (1, found["metadata"]["uid"])
        await until_running(stage)
        await stage.report("example", 1, step=100, result=Result.SUCCEEDED)
        await stage.kuberay("example-1", "Complete", "SUCCEEDED")
        await asyncio.sleep(60)
        assert stage.status()["phase"] == "Succeeded"
        assert stage.condition("Complete")["status"] == "True"

    play(scenario)


def test_an_attempt_starts_with_its_ray_job_and_the_plan_that_pods_wait_for_comes_last_before_the_status() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(runtime_document(name="pool"))
        await stage.submit(job_document({"runtimeRef": {"name": "pool"}}))
        await asyncio.sleep(1)
        writes = [one for one in stage.cluster.writes() if one.kind != EVENT]
        names = [one.name for one in writes]
        assert names[:2] == ["example-runtime", "example-1"]
        assert writes[1].kind == RAY_JOB
        assert set(names[2:-2]) == {"example", "example-trainer", "example-progress"}
        assert names[-2:] == ["example-1-plan", "example"]
        assert [one.verb for one in writes if one.kind == FINETUNE_JOB] == ["status"]
        assert [one.verb for one in stage.cluster.asked if one.name == "example-1"] == ["create"]

    play(scenario)


def test_of_jobs_that_wait_together_all_get_their_ray_job_before_the_rest_is_made_for_any() -> None:
    async def main() -> None:
        stage = Stage(Settings(pod_name="operator-0", workers=4))
        for number in range(40):
            await stage.submit(job_document(name=f"job-{number}"))
        async with stage.operator():
            await asyncio.sleep(5)
        kinds = [one.kind for one in stage.cluster.writes()]
        assert kinds[:40] == [RAY_JOB] * 40
        assert len(stage.names(ROLE)) == 40
        assert all(stage.status(f"job-{number}")["phase"] == "Starting" for number in range(40))

    run(main())


def test_while_others_begin_kuberays_touch_brings_the_rest_at_once_and_patience_has_an_end() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document(name="waits"))
        await stage.submit(job_document(name="touched"))
        for number in range(160):
            await stage.submit(job_document(name=f"job-{number}"))
            await asyncio.sleep(0.25)
            match number:
                case 8:
                    assert stage.names(ROLE) == []
                    await stage.kuberay("touched-1", "Initializing")
                case 10 | 100:
                    assert stage.names(ROLE) == ["touched-trainer"]
                case 159:
                    assert "waits-trainer" in stage.names(ROLE)
        await asyncio.sleep(20)
        assert len(stage.names(ROLE)) == 162

    play(scenario)


def test_when_one_object_is_refused_the_ray_job_is_taken_back_and_comes_last_from_then_on() -> None:
    async def scenario(stage: Stage) -> None:
        def refuse(asked: Asked) -> None:
            if asked.verb == "create" and asked.kind == SERVICE_ACCOUNT:
                raise Forbidden(403, "Forbidden", "not you")

        stage.cluster.before = refuse
        await stage.submit(job_document())
        await asyncio.sleep(1)
        assert stage.names(RAY_JOB) == []
        assert stage.names(CONFIG_MAP) == ["example-progress"]
        assert stage.condition("ClusterReady")["reason"] == "Forbidden"
        await asyncio.sleep(3600)
        assert [one.verb for one in stage.cluster.asked if one.kind == RAY_JOB] == ["create", "delete"]
        stage.cluster.before = lambda _: None
        await asyncio.sleep(301)
        created = [
            one.name for one in stage.cluster.asked if one.verb == "create" and one.kind in (CONFIG_MAP, RAY_JOB)
        ]
        assert created[-2:] == ["example-1-plan", "example-1"]
        assert [attempt["number"] for attempt in stage.status()["attempts"]] == [1]

    play(scenario)


@pytest.mark.parametrize("change", ["edited", "suspended", "deleted"])
def test_a_job_that_changes_before_its_plan_is_made_gets_a_ray_job_of_what_it_is_now(change: str) -> None:
    async def scenario(stage: Stage) -> None:
        def refuse(asked: Asked) -> None:
            if asked.verb == "create" and asked.kind == SERVICE_ACCOUNT:
                raise Unreachable("connection refused")

        stage.cluster.before = refuse
        await stage.submit(job_document())
        await asyncio.sleep(1)
        (first,) = stage.there.select(RAY_JOB, NAMESPACE)
        if change == "edited":
            await stage.change("example", {"training": {"seed": 7}})
        elif change == "suspended":
            await stage.change("example", {"suspend": True})
        else:
            await stage.there.delete(FINETUNE_JOB, Key(NAMESPACE, "example"))
        stage.cluster.before = lambda _: None
        await asyncio.sleep(60)
        left = stage.there.select(RAY_JOB, NAMESPACE)
        assert first["metadata"]["uid"] not in [one["metadata"]["uid"] for one in left]
        assert len(left) == (change == "edited")
        if change == "edited":
            plan = stage.there.peek(CONFIG_MAP, Key(NAMESPACE, "example-1-plan"))
            assert plan is not None
            assert '"seed": 7' in plan["data"]["plan.json"]
            assert [attempt["number"] for attempt in stage.status()["attempts"]] == [1]
            assert stage.status()["restarts"] == 0
        elif change == "suspended":
            assert stage.status()["phase"] == "Suspended"
            assert not stage.status().get("attempts")

    play(scenario)


def test_in_a_cluster_a_job_that_needs_files_which_pods_share_starts_when_its_runtime_has_a_storage() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document({"checkpoint": {}, "runtimeRef": {"name": "pool"}}))
        await stage.submit(runtime_document(name="pool"))
        await asyncio.sleep(1)
        valid = stage.condition("Valid")
        assert (valid["status"], valid["reason"]) == ("False", "PlanRefused")
        assert valid["message"].startswith("spec.checkpoint: would be lost with the pods")
        assert stage.names(RAY_JOB) == []
        await stage.there.merge(FINETUNE_RUNTIME, Key("", "pool"), {"spec": {"storage": "pvc://runs/jobs"}})
        await asyncio.sleep(1)
        assert stage.names(RAY_JOB) == ["example-1"]

    play(scenario)


def test_a_model_that_will_go_with_its_pods_is_warned_of_when_they_are_asked_for() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document(name="lost"))
        await stage.submit(job_document({"outputs": [{"to": "s3://bucket/model"}]}, "kept"))
        await asyncio.sleep(1)
        warned = {
            name: "will be lost with its pods: the job has no spec.outputs" in stage.condition("Valid", name)["message"]
            for name in ("lost", "kept")
        }
        assert warned == {"lost": True, "kept": False}
        assert stage.reasons().count("ModelWillBeLost") == 1

    play(scenario)


def test_no_pod_of_ours_mounts_a_plan_that_somebody_else_has_laid_out() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.there.create(CONFIG_MAP, config_map("example-1-plan"))
        await stage.submit(job_document())
        await asyncio.sleep(300)
        assert not [one for one in stage.cluster.asked if one.kind == RAY_JOB]
        assert stage.condition("ClusterReady")["reason"] == "NameTaken"

    play(scenario)


def test_the_ends_of_attempts_and_the_first_step_are_counted_once() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await until_running(stage)
        await asyncio.sleep(100)
        await stage.report("example", 1, step=100, result=Result.SUCCEEDED)
        await stage.kuberay("example-1", "Complete", "SUCCEEDED")
        await asyncio.sleep(600)
        assert stage.metric("finetune_attempts_total", outcome="Succeeded") == 1
        assert stage.metric("finetune_time_to_first_step_seconds_count") == 1
        assert stage.metric("finetune_goodput_ratio_count") == 1
        assert stage.metric("finetune_jobs", phase="Succeeded", method="sft") == 1

    play(scenario)


def test_while_nothing_changes_nothing_is_written() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await stage.submit(job_document({"runtimeRef": {"name": "absent"}}, name="waits"))
        await stage.submit(job_document({"training.epochs": -1}, name="wrong"))
        await until_running(stage)
        await asyncio.sleep(60)
        stage.cluster.asked.clear()
        await asyncio.sleep(1500)
        assert stage.cluster.asked == []

    play(scenario)


def test_progress_alone_is_written_every_fifteen_seconds_at_most_and_anything_else_at_once() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await until_running(stage)
        stage.cluster.asked.clear()
        for step in range(2, 62):
            await stage.report("example", 1, step=step)
            await asyncio.sleep(1)
        num_writes = sum(one.verb == "status" for one in stage.cluster.asked)
        assert 60 / PROGRESS_SECONDS - 1 <= num_writes <= 60 / PROGRESS_SECONDS + 1
        await asyncio.sleep(PROGRESS_SECONDS)
        assert stage.status()["progress"]["step"] == 61
        await stage.report("example", 1, step=62)
        await asyncio.sleep(1)
        await stage.kuberay("example-1", "Failed", "FAILED", "Job entrypoint command failed with exit code 2")
        await asyncio.sleep(1)
        assert stage.status()["phase"] == "Failed"

    play(scenario)


def test_a_pass_does_not_decide_on_a_job_older_than_its_own_last_write() -> None:
    async def main() -> None:
        stage = Stage()
        stored = await stage.submit(job_document())

        async with stage.operator() as operator:
            await asyncio.sleep(1)
            world = operator.world(KEY)
        assert world is not None
        stage.cluster.asked.clear()
        seen = [world]
        reconciler = Reconciler(stage.cluster, lambda _: seen[0], now, stage.settings)
        await stage.kuberay("example-1", "Failed", "FAILED", "exit code 2")
        failed = stage.there.select(RAY_JOB, NAMESPACE)
        seen[0] = type(world)(**{**vars(world), "children": {**world.children, RAY_JOB: failed}})
        await reconciler.reconcile(KEY)
        assert [one.verb for one in stage.cluster.asked if one.kind == FINETUNE_JOB] == ["status"]
        num_asked = len(stage.cluster.asked)
        wait = await reconciler.reconcile(KEY)
        assert wait is not None
        assert 0 < wait < 60
        assert len(stage.cluster.asked) == num_asked
        assert stored["metadata"]["uid"]

    run(main())


def test_a_ray_job_that_the_watch_does_not_show_is_looked_up_before_it_counts_as_deleted() -> None:
    async def main() -> None:
        stage = Stage()
        await stage.submit(job_document())
        async with stage.operator() as operator:
            await until_running(stage)
            world = operator.world(KEY)
        assert world is not None
        blind = type(world)(**{**vars(world), "children": {**world.children, RAY_JOB: []}})
        reconciler = Reconciler(stage.cluster, lambda _: blind, now, stage.settings)
        stage.cluster.asked.clear()
        await reconciler.reconcile(KEY)
        assert [one for one in stage.cluster.writes() if one.kind != EVENT] == []
        assert Asked("get", RAY_JOB, "example-1") in stage.cluster.asked
        assert stage.status()["phase"] == "Running"

    run(main())


def test_no_ray_job_is_created_for_a_job_that_is_older_than_the_servers() -> None:
    async def main() -> None:
        stage = Stage()
        await stage.submit(job_document({"suspend": True}))
        async with stage.operator() as operator:
            await asyncio.sleep(1)
            world = operator.world(KEY)
        assert world is not None
        hanging = type(world)(**{**vars(world), "job": {**world.job, "spec": job_document()["spec"]}})
        await stage.change("example", {"training": {"seed": 7}})
        reconciler = Reconciler(stage.cluster, lambda _: hanging, now, stage.settings)
        with pytest.raises(Conflict):
            await reconciler.reconcile(KEY)
        assert stage.names(RAY_JOB) == []

    run(main())


def test_a_ray_job_deleted_by_hand_ends_its_attempt_and_the_next_one_follows() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await until_running(stage)
        await stage.there.delete(RAY_JOB, Key(NAMESPACE, "example-1"))
        await asyncio.sleep(SECOND_ATTEMPT_SECONDS)
        first, second = stage.status()["attempts"]
        assert first["outcome"] == "Unknown"
        assert "deleted" in first["message"]
        assert second["number"] == 2
        assert stage.names(RAY_JOB) == ["example-2"]

    play(scenario)


@pytest.mark.parametrize("kind", [RAY_JOB, CONFIG_MAP, SERVICE_ACCOUNT], ids=lambda kind: kind.name)
def test_an_object_of_somebody_else_in_the_way_is_left_alone_and_named(kind: Any) -> None:
    name = {RAY_JOB: "example-1", CONFIG_MAP: "example-progress", SERVICE_ACCOUNT: "example-trainer"}[kind]

    async def scenario(stage: Stage) -> None:
        theirs = {"apiVersion": kind.api_version, "kind": kind.name}
        metadata = {"name": name, "namespace": NAMESPACE, "labels": {"app": "theirs"}}
        before = await stage.there.create(kind, {**theirs, "metadata": metadata})
        await stage.submit(job_document())
        await asyncio.sleep(300)
        condition = stage.condition("ClusterReady")
        assert (condition["status"], condition["reason"]) == ("False", "NameTaken")
        assert f"{kind.name} {name}" in condition["message"]
        assert stage.there.peek(kind, Key(NAMESPACE, name)) == before
        assert not stage.status().get("attempts")
        assert sum(one.verb == "status" for one in stage.cluster.asked) <= 2
        await stage.there.delete(kind, Key(NAMESPACE, name))
        await asyncio.sleep(70)
        assert stage.names(RAY_JOB) == ["example-1"]

    play(scenario)


def test_what_a_job_of_the_same_name_left_behind_is_waited_for_and_not_taken_over() -> None:
    async def scenario(stage: Stage) -> None:
        # Nothing is left without an owner in memory: another job lends its uid.
        other = await stage.submit(job_document({"managedBy": "somebody.else/manager"}, name="other"))
        owner = {"kind": "FineTuneJob", "name": "example", "uid": other["metadata"]["uid"], "controller": True}
        metadata = {"name": "example-trainer", "namespace": NAMESPACE, "ownerReferences": [owner]}
        await stage.there.create(SERVICE_ACCOUNT, {"metadata": metadata})
        await stage.submit(job_document())
        await asyncio.sleep(30)
        assert stage.names(RAY_JOB) == []
        assert "earlier job" in stage.condition("ClusterReady")["message"]
        await stage.there.delete(SERVICE_ACCOUNT, Key(NAMESPACE, "example-trainer"))
        await asyncio.sleep(5)
        assert stage.names(RAY_JOB) == ["example-1"]

    play(scenario)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Forbidden(403, "Forbidden", "exceeded quota: team, requested: pods=3"), "Forbidden"),
        (Forbidden(403, "Forbidden", "unable to create: namespace is being terminated"), "NamespaceTerminating"),
        (Invalid(422, "Invalid", "spec.rayClusterSpec: Required value"), "Refused"),
    ],
    ids=["forbidden", "terminating", "invalid"],
)
def test_a_refused_object_becomes_a_condition_that_helps_and_no_hot_loop(error: ApiError, reason: str) -> None:
    def refuse(asked: Asked) -> None:
        if asked.verb == "create" and asked.kind == RAY_JOB:
            raise error

    async def scenario(stage: Stage) -> None:
        stage.cluster.before = refuse
        await stage.submit(job_document())
        await asyncio.sleep(3600)
        condition = stage.condition("ClusterReady")
        assert (condition["status"], condition["reason"]) == ("False", reason)
        assert error.message in condition["message"]
        assert stage.status()["phase"] == "Pending"
        assert not stage.status().get("attempts")
        num_tried = sum(one.verb == "create" and one.kind == RAY_JOB for one in stage.cluster.asked)
        assert 10 <= num_tried <= 65
        assert sum(one.verb == "status" for one in stage.cluster.asked) <= 2
        assert stage.reasons().count(reason) == 1
        stage.cluster.before = lambda _: None
        await asyncio.sleep(301)
        assert stage.status()["attempts"][-1]["number"] == 1
        assert stage.condition("ClusterReady")["reason"] != reason

    play(scenario)


@pytest.mark.parametrize(
    "error",
    [
        Unreachable("connection refused"),
        TooManyRequests(429, "TooManyRequests", "later", retry_after=3),
        ApiError(500, "InternalError", "etcd is slow"),
        Conflict(409, "Conflict", "the object has been modified"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("verb", ["create", "status"])
def test_a_request_that_fails_for_a_while_is_made_good(error: ClusterError, verb: str) -> None:
    async def scenario(stage: Stage) -> None:
        def refuse(asked: Asked) -> None:
            if asked.verb == verb and asyncio.get_running_loop().time() < 20:
                raise error

        stage.cluster.before = refuse
        await stage.submit(job_document())
        await asyncio.sleep(60)
        stage.cluster.before = lambda _: None
        assert stage.names(RAY_JOB) == ["example-1"]
        assert [attempt["number"] for attempt in stage.status()["attempts"]] == [1]
        await until_running(stage)

    play(scenario)


async def live(stage: Stage) -> None:
    """A life with a failure in it, as KubeRay and the trainers live it, however far the operator has come."""

    async def once(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(400):
            while not condition():
                await asyncio.sleep(0.5)

    await once(lambda: "example-1" in stage.names(RAY_JOB) and "example-progress" in stage.names(CONFIG_MAP))
    await stage.kuberay("example-1", "Running", "RUNNING")
    await stage.report("example", 1, step=10)
    await once(lambda: stage.status().get("phase") == "Running")
    message = "Job entrypoint command failed with exit code 6, last available logs: no space left on device"
    await stage.kuberay("example-1", "Failed", "FAILED", message, reason="AppFailed")
    await once(lambda: "example-2" in stage.names(RAY_JOB))
    await stage.kuberay("example-2", "Running", "RUNNING")
    await stage.report("example", 2, step=100, result=Result.SUCCEEDED)
    await stage.kuberay("example-2", "Complete", "SUCCEEDED")
    await once(lambda: stage.status().get("phase") == "Succeeded")


def told(stage: Stage) -> Any:
    """What the life came to, without the times."""
    status = stage.status()
    attempts = [{name: one.get(name) for name in ("number", "outcome", "action", "step")} for one in status["attempts"]]
    return status["phase"], status.get("restarts"), attempts


class Life:
    """Plays a life with an operator that is killed when it has written so often, and another after it."""

    def __init__(self, kill_at: int) -> None:
        self.stage = Stage()
        self.killed = False
        self.started: list[str] = []
        self._kill_at = kill_at

    async def play(self) -> None:
        there, create = self.stage.there, self.stage.there.create

        async def noting(kind: Any, document: Any) -> Any:
            if kind == RAY_JOB:
                self.started.append(document["metadata"]["name"])
            return await create(kind, document)

        there.create = noting  # type: ignore[method-assign]
        await self.stage.submit(job_document())
        living = asyncio.create_task(live(self.stage))
        dead = asyncio.Event()

        def kill(_: Asked) -> None:
            if len(self.stage.cluster.writes()) > self._kill_at:
                dead.set()
                raise Unreachable("killed")

        self.stage.cluster.before = kill
        async with self.stage.operator():
            await asyncio.wait((living, asyncio.create_task(dead.wait())), return_when=asyncio.FIRST_COMPLETED)
        self.killed = dead.is_set()
        self.stage.cluster.before = lambda _: None
        async with self.stage.operator():
            await living
            await asyncio.sleep(30)


def test_an_operator_killed_at_any_write_of_a_life_goes_on_as_if_nothing_had_been() -> None:
    undisturbed = Life(10_000)
    run(undisturbed.play())
    assert not undisturbed.killed
    expected = told(undisturbed.stage)
    assert [attempt["outcome"] for attempt in expected[2]] == ["StorageError", "Succeeded"]
    num_kills = 0
    for kill_at in range(200):
        life = Life(kill_at)
        run(life.play())
        assert told(life.stage) == expected, f"killed at write {kill_at}"
        assert sorted(set(life.started)) == ["example-1", "example-2"]
        assert life.stage.names(RAY_JOB) == ["example-2"]
        if not life.killed:
            break
        num_kills += 1
    assert num_kills > 15


def test_a_deleted_job_takes_everything_along() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await until_running(stage)
        await stage.there.delete(FINETUNE_JOB, KEY)
        await asyncio.sleep(60)
        assert [one["kind"] for one in stage.there.dump() if one["kind"] != "Event"] == []
        stage.cluster.asked.clear()
        await asyncio.sleep(600)
        assert stage.cluster.asked == []

    play(scenario)
