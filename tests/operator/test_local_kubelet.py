"""The local kubelet: a RayJob becomes a running entrypoint, and its status what KubeRay would write."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_operator import names
from finetune_operator.cluster.protocol import Document
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB, Key
from finetune_operator.local import LocalCluster
from finetune_operator.local.kubelet import CannotLaunch, Kubelet, Launch
from finetune_operator.states import read_ray_job, read_report
from tests.operator.fake_entrypoint import NOW, FakeEntrypoint


class Machine:
    """A cluster, its kubelet, and what that has started."""

    def __init__(self) -> None:
        self.time = 0.0
        self.refuses: str | None = None
        self.started: list[FakeEntrypoint] = []
        self.cluster = LocalCluster(clock=lambda: NOW)
        self.kubelet = Kubelet(self.cluster, self.launch, lambda: NOW, lambda: self.time)

    def launch(self, launch: Launch) -> FakeEntrypoint:
        if self.refuses:
            raise CannotLaunch(self.refuses)
        self.started.append(FakeEntrypoint(launch))
        return self.started[-1]

    async def create(self, job: str = "tiny", attempt: int = 1, suspend: bool = False) -> Document:
        for name, data in (
            (names.progress_config_map(job), {}),
            (names.plan_config_map(job, attempt), {"plan.json": f"the plan of {job}"}),
        ):
            if await self.cluster.get(CONFIG_MAP, Key("default", name)) is None:
                await self.cluster.create(CONFIG_MAP, {"metadata": meta(name), "data": data})
        metadata = meta(names.ray_job(job, attempt)) | {"labels": names.attempt_labels(job, attempt)}
        return await self.cluster.create(RAY_JOB, {"metadata": metadata, "spec": {"suspend": suspend}})

    async def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.time += 0.1
            await self.kubelet.look()

    async def until_running(self) -> FakeEntrypoint:
        await self.look(4)
        assert self.status()["jobStatus"] == "RUNNING"
        return self.started[-1]

    def status(self, job: str = "tiny", attempt: int = 1) -> Any:
        found = self.cluster.peek(RAY_JOB, Key("default", names.ray_job(job, attempt)))
        assert found is not None
        return found.get("status", {})

    def reported(self, job: str = "tiny") -> Any:
        return self.cluster.peek(CONFIG_MAP, Key("default", names.progress_config_map(job)))


def meta(name: str) -> dict[str, Any]:
    return {"name": name, "namespace": "default"}


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_a_ray_job_goes_the_way_that_kuberay_leads_it() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        seen = []
        for _ in range(4):
            await machine.look()
            seen.append((machine.status()["jobDeploymentStatus"], machine.status().get("jobStatus", "")))
        assert seen == [("Initializing", ""), ("Running", "PENDING"), ("Running", "RUNNING"), ("Running", "RUNNING")]
        assert machine.started[0].launch == Launch(Key("default", "tiny"), 1, "the plan of tiny")
        machine.started[0].code = 0
        await machine.look()
        status = machine.status()
        assert (status["jobDeploymentStatus"], status["jobStatus"]) == ("Complete", "SUCCEEDED")
        assert status["message"] == "Job finished successfully."
        assert status["startTime"] == status["endTime"] == "2026-01-01T00:00:00Z"
        assert machine.kubelet.idle

    run(scenario())


@pytest.mark.parametrize("code", [1, 5, 137])
def test_an_entrypoint_that_fails_tells_its_exit_code_and_its_last_lines(code: int) -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        entrypoint = await machine.until_running()
        entrypoint.code, entrypoint.log_tail = code, "the last line"
        await machine.look()
        state = read_ray_job({"metadata": {}, "status": machine.status()})
        assert (state.deployment_status, state.job_status, state.reason) == ("Failed", "FAILED", "AppFailed")
        assert f"failed with exit code {code}, last available logs" in state.message
        assert state.message.endswith("the last line")
        assert machine.status()["failed"] == 1

    run(scenario())


def test_what_the_trainers_report_is_in_the_config_map_with_the_attempt_and_at_most_once_a_second() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create(attempt=3)
        await machine.look(4)
        entrypoint, before = machine.started[0], machine.cluster.version
        for step in range(1, 26):
            entrypoint.report(step)
            await machine.look()
        report = read_report(machine.reported())
        assert report.attempt == 3
        assert report.progress is not None
        assert 20 <= report.progress.step < 25
        assert machine.cluster.version - before == 3

    run(scenario())


def test_the_outcome_is_told_before_the_end_and_the_next_attempts_report_takes_it_away() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        entrypoint = await machine.until_running()
        entrypoint.report(7)
        entrypoint.fail(FailureClass.NON_FINITE_LOSS)
        version = str(machine.cluster.version)
        await machine.look()
        report = read_report(machine.reported())
        assert report.outcome == entrypoint.outcome
        assert report.progress == entrypoint.progress
        ended = machine.cluster.peek(RAY_JOB, Key("default", "tiny-1"))
        assert ended is not None
        assert int(version) < int(machine.reported()["metadata"]["resourceVersion"])
        assert int(machine.reported()["metadata"]["resourceVersion"]) < int(ended["metadata"]["resourceVersion"])
        await machine.create(attempt=2)
        await machine.look(3)
        machine.started[1].report(1)
        await machine.look(12)
        report = read_report(machine.reported())
        assert (report.attempt, report.outcome) == (2, None)

    run(scenario())


def test_deleting_a_ray_job_stops_its_entrypoint_and_nothing_starts_before_it_is_gone() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        entrypoint = await machine.until_running()
        await machine.cluster.delete(RAY_JOB, Key("default", "tiny-1"))
        await machine.create(attempt=2)
        await machine.look()
        assert entrypoint.looks_until_stopped == 0
        assert not machine.kubelet.idle
        assert len(machine.started) == 1
        await machine.look(6)
        assert entrypoint.code == 130
        assert [one.launch.attempt for one in machine.started] == [1, 2]

    run(scenario())


def test_an_entrypoint_that_is_asked_to_save_and_to_stop_does_so_and_its_report_is_there_before_the_end() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create(attempt=2)
        await machine.look(4)
        entrypoint = machine.started[0]
        entrypoint.saves = True
        entrypoint.report(7)
        for asked, ends in (("1", False), ("2", True)):
            wish = {"data": {"stop-attempt": asked}}
            await machine.cluster.merge(CONFIG_MAP, Key("default", "tiny-progress"), wish)
            await machine.look(5)
            assert (entrypoint.code == 130) is ends, f"asked of attempt {asked}"
        report = read_report(machine.reported())
        assert report.progress is not None
        assert report.progress.checkpoint is not None
        assert (report.progress.checkpoint.step, report.stop_attempt) == (7, 2)
        assert report.outcome is not None
        assert machine.status(attempt=2)["jobStatus"] == "FAILED"

    run(scenario())


def test_suspending_a_ray_job_stops_it_and_taking_that_back_starts_it_anew() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        await machine.until_running()
        await machine.cluster.merge(RAY_JOB, Key("default", "tiny-1"), {"spec": {"suspend": True}})
        seen = set()
        for _ in range(5):
            await machine.look()
            seen.add(machine.status()["jobDeploymentStatus"])
        assert seen == {"Suspending", "Suspended"}
        assert "jobId" not in machine.status()
        assert machine.kubelet.idle
        await machine.cluster.merge(RAY_JOB, Key("default", "tiny-1"), {"spec": {"suspend": False}})
        await machine.look(4)
        assert machine.status()["jobStatus"] == "RUNNING"
        assert len(machine.started) == 2

    run(scenario())


def test_the_machine_trains_one_job_at_a_time_and_the_others_wait_their_turn() -> None:
    async def scenario() -> None:
        machine = Machine()
        for job in ("first", "third", "second"):
            await machine.create(job)
        await machine.look(6)
        assert [one.launch.job.name for one in machine.started] == ["first"]
        assert machine.status("third")["jobDeploymentStatus"] == "Suspended"
        machine.started[0].code = 0
        await machine.look(6)
        machine.started[1].code = 1
        await machine.look(6)
        assert [one.launch.job.name for one in machine.started] == ["first", "third", "second"]

    run(scenario())


def test_a_ray_job_that_was_created_for_a_queue_is_admitted_when_the_machine_is_free() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create(suspend=True)
        await machine.look(8)
        assert len(machine.started) == 1

    run(scenario())


def test_a_ray_job_whose_process_nobody_watches_any_more_has_failed() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        await machine.until_running()
        after = Machine()
        after.cluster.restore(machine.cluster.dump())
        await after.look()
        assert after.status()["jobStatus"] == "FAILED"
        assert "ended before it did" in after.status()["message"]

    run(scenario())


def test_what_cannot_be_launched_has_failed_with_the_reason() -> None:
    async def scenario() -> None:
        machine = Machine()
        machine.refuses = "the folder is not writable"
        await machine.create()
        await machine.look(3)
        assert machine.status()["jobDeploymentStatus"] == "Failed"
        assert machine.status()["message"].endswith("the folder is not writable")

    run(scenario())


def test_a_ray_job_without_its_plan_has_failed_with_the_reason() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        await machine.cluster.delete(CONFIG_MAP, Key("default", "tiny-1-plan"))
        await machine.look(3)
        assert machine.status()["message"].endswith("ConfigMap tiny-1-plan with the plan is not there")

    run(scenario())


def test_a_person_who_ends_it_all_stops_what_runs_and_nothing_starts_afterwards() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        await machine.until_running()
        await machine.create("waits")
        machine.kubelet.stop()
        await machine.look(8)
        assert (machine.status()["jobDeploymentStatus"], machine.status()["jobStatus"]) == ("Complete", "STOPPED")
        assert machine.kubelet.idle
        assert len(machine.started) == 1

    run(scenario())


def test_a_job_that_was_deleted_while_it_ran_leaves_no_report_and_no_process() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create()
        entrypoint = await machine.until_running()
        entrypoint.report(1)
        await machine.cluster.delete(RAY_JOB, Key("default", "tiny-1"))
        await machine.cluster.delete(CONFIG_MAP, Key("default", "tiny-progress"))
        await machine.look(4)
        assert machine.kubelet.idle
        assert machine.reported() is None

    run(scenario())


def test_a_ray_job_that_is_let_go_too_early_still_waits_for_the_machine() -> None:
    async def scenario() -> None:
        machine = Machine()
        await machine.create("first")
        await machine.create("second")
        await machine.look(6)
        await machine.cluster.merge(RAY_JOB, Key("default", "second-1"), {"spec": {"suspend": False}})
        await machine.look(6)
        assert machine.status("second")["jobDeploymentStatus"] == "Initializing"
        machine.started[0].code = 0
        await machine.look(3)
        assert [one.launch.job.name for one in machine.started] == ["first", "second"]

    run(scenario())
