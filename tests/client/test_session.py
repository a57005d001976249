"""The operator on this machine, in virtual time and without processes: attempts, restarts, suspension, chains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.job import FineTuneJob, Phase, Status
from finetune_api.plan import RunPlan
from finetune_client.folders import RunFolder
from finetune_client.session import Session, key_of_job
from finetune_operator.conditions import find
from finetune_operator.kinds import Key
from finetune_operator.local.kubelet import Launch
from tests.factories import job as make_job
from tests.factories import runtime
from tests.operator.fake_entrypoint import NOW, FakeEntrypoint
from tests.operator.runtime.virtual_time import run

TINY = Key("default", "tiny")
SOURCE = "hf://org/tiny-8B"
Script = Callable[["Laptop", FakeEntrypoint], None]
_LONGEST_SECONDS = 2000.0
"""Of virtual time: a run that has not ended by then never will."""


class Laptop:
    """A session whose entrypoints do as a script says, each at its first look."""

    def __init__(self, folder: RunFolder, *scripts: Script) -> None:
        self.folder = folder
        self.started: list[FakeEntrypoint] = []
        self.looks: list[Callable[[], None]] = []
        self._scripts = scripts
        self.session = Session(folder, self.launch, clock=self.now, timer=self.time)

    def time(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.time())

    def launch(self, launch: Launch) -> FakeEntrypoint:
        entrypoint = FakeEntrypoint(launch)
        self.started.append(entrypoint)
        self._scripts[len(self.started) - 1](self, entrypoint)
        return entrypoint

    def look(self) -> None:
        for look in self.looks:
            look()

    async def play(self, *jobs: FineTuneJob) -> None:
        await self.session.submit(jobs, [runtime()])
        await self.session.run(self.look)

    async def go_on(self) -> None:
        await self.session.go_on()
        await self.session.run(self.look)

    def status(self, key: Key = TINY) -> Status:
        return self.session.status(key)

    @property
    def outcomes(self) -> list[tuple[int, str | None]]:
        return [(attempt.number, attempt.outcome) for attempt in self.status().attempts]


WHOLE: dict[str, Any] = {"tuning": {"full": {}}}


def tiny(changes: dict[str, Any] | None = None, name: str = "tiny") -> FineTuneJob:
    return make_job({"model.source": SOURCE, "training": {"maxSteps": 5}} | (changes or {}), name=name)


def folder_for(path: Path, *jobs: FineTuneJob) -> RunFolder:
    folders = {key_of_job(one): one.metadata.name if len(jobs) > 1 else "." for one in jobs}
    return RunFolder.create(path / "run", folders, True, None)


def play(path: Path, jobs: list[FineTuneJob], *scripts: Script, looks: Callable[[Laptop], Any] | None = None) -> Laptop:
    """Run the jobs to the end, each new entrypoint by the next script; `looks` is called at every look."""

    async def scenario() -> Laptop:
        with folder_for(path, *jobs) as folder:
            laptop = Laptop(folder, *scripts)
            if looks is not None:
                laptop.looks.append(lambda: looks(laptop))
            async with asyncio.timeout(_LONGEST_SECONDS):
                await laptop.play(*jobs)
            return laptop

    return run(scenario())


def go_on(path: Path, *scripts: Script) -> Laptop:
    async def scenario() -> Laptop:
        with RunFolder.reopen(path / "run") as folder:
            laptop = Laptop(folder, *scripts)
            async with asyncio.timeout(_LONGEST_SECONDS):
                await laptop.go_on()
            return laptop

    return run(scenario())


def steps(number: int, then: Callable[[FakeEntrypoint], None] = lambda _: None) -> Script:
    """Makes so many steps, and then ends somehow, or goes on for ever."""

    def script(laptop: Laptop, entrypoint: FakeEntrypoint) -> None:
        entrypoint.report(number, laptop.now())
        then(entrypoint)

    return script


def failing(kind: FailureClass) -> Callable[[FakeEntrypoint], None]:
    return lambda entrypoint: entrypoint.fail(kind)


DONE = steps(5, FakeEntrypoint.succeed)
KILLED = steps(3, FakeEntrypoint.die)
FOR_EVER = steps(3)


def test_a_job_succeeds_with_its_artifact_and_the_conditions_of_a_cluster(tmp_path: Path) -> None:
    status = play(tmp_path, [tiny()], DONE).status()
    assert status.phase is Phase.SUCCEEDED
    assert [artifact.uri for artifact in status.artifacts] == ["file:///artifact"]
    conditions = {one.type: one.status for one in status.conditions}
    assert conditions["Complete"] == conditions["Valid"] == conditions["ArtifactsPublished"] == "True"
    assert status.ray_job == "tiny-1"


def test_an_attempt_that_was_killed_is_followed_by_another_after_the_back_off(tmp_path: Path) -> None:
    laptop = play(tmp_path, [tiny()], KILLED, DONE)
    assert laptop.outcomes == [(1, "Unknown"), (2, "Succeeded")]
    status = laptop.status()
    assert (status.phase, status.restarts) == (Phase.SUCCEEDED, 1)
    first, second = status.attempts
    assert first.ended_at is not None
    assert 10 <= (second.created_at - first.ended_at).total_seconds() <= 12
    assert status.post_mortem is not None
    assert status.post_mortem.exit_code == 137


def test_a_loss_that_is_not_finite_fails_at_once_with_its_class(tmp_path: Path) -> None:
    laptop = play(tmp_path, [tiny()], steps(3, failing(FailureClass.NON_FINITE_LOSS)))
    assert laptop.outcomes == [(1, "NonFiniteLoss")]
    assert (laptop.status().phase, laptop.status().failure) == (Phase.FAILED, FailureClass.NON_FINITE_LOSS)


def test_an_attempt_without_memory_is_followed_by_one_with_a_smaller_micro_batch(tmp_path: Path) -> None:
    job = tiny({"training": {"maxSteps": 5, "globalBatchSize": 8, "microBatchSize": 4}})
    laptop = play(tmp_path, [job], steps(1, failing(FailureClass.OUT_OF_MEMORY)), DONE)
    plans = [RunPlan.model_validate_json(one.launch.plan) for one in laptop.started]
    assert [plan.batch.micro_batch_size for plan in plans] == [4, 2]
    assert [plan.batch.global_batch_size for plan in plans] == [8, 8]


def test_attempts_that_come_no_further_end_the_job(tmp_path: Path) -> None:
    job = tiny({"failurePolicy": {"maxRestarts": 100}})
    status = play(tmp_path, [job], *[KILLED] * 10).status()
    failed = find(status.conditions, "Failed")
    assert failed is not None
    assert failed.reason == "NoProgress"
    assert len(status.attempts) == 4


def test_a_trainer_that_says_nothing_for_too_long_is_ended_and_tried_again(tmp_path: Path) -> None:
    laptop = play(tmp_path, [tiny({"failurePolicy": {"hangTimeoutSeconds": 60}})], FOR_EVER, DONE)
    assert laptop.outcomes == [(1, "Hang"), (2, "Succeeded")]
    assert laptop.started[0].code == 130


def test_a_suspended_job_leaves_no_process_and_goes_on_as_the_next_attempt(tmp_path: Path) -> None:
    def suspend(laptop: Laptop) -> None:
        if laptop.started:
            laptop.session.suspend(TINY)

    laptop = play(tmp_path, [tiny()], FOR_EVER, looks=suspend)
    assert laptop.status().phase is Phase.SUSPENDED
    assert laptop.outcomes == [(1, "Suspended")]
    assert laptop.started[0].code == 130
    after = go_on(tmp_path, DONE)
    assert after.outcomes == [(1, "Suspended"), (2, "Succeeded")]
    assert after.started[0].launch.attempt == 2
    assert after.status().restarts == 0


def test_a_job_that_saves_is_asked_to_before_it_is_suspended_and_its_next_attempt_goes_on(tmp_path: Path) -> None:
    def saving(laptop: Laptop, entrypoint: FakeEntrypoint) -> None:
        entrypoint.saves = True
        entrypoint.report(3, laptop.now())

    def suspend(laptop: Laptop) -> None:
        if laptop.started:
            laptop.session.suspend(TINY)

    def resumed(laptop: Laptop, entrypoint: FakeEntrypoint) -> None:
        entrypoint.report(5, laptop.now(), resumed=3)
        entrypoint.succeed()

    laptop = play(tmp_path, [tiny({"checkpoint": {}})], saving, looks=suspend)
    status = laptop.status()
    assert (status.phase, laptop.outcomes) == (Phase.SUSPENDED, [(1, "Suspended")])
    assert status.attempts[0].stop_asked_at is not None
    assert status.checkpoint is not None
    assert status.checkpoint.step == 3
    after = go_on(tmp_path, resumed).status()
    assert after.attempts[1].resumed_from_step == 3
    assert after.checkpoint == status.checkpoint


def test_a_job_that_its_failure_policy_suspended_goes_on_too(tmp_path: Path) -> None:
    job = tiny({"failurePolicy": {"rules": [{"action": "Suspend"}]}})
    laptop = play(tmp_path, [job], KILLED)
    assert (laptop.status().phase, laptop.outcomes) == (Phase.SUSPENDED, [(1, "Unknown")])
    assert go_on(tmp_path, DONE).outcomes == [(1, "Unknown"), (2, "Succeeded")]


def test_a_run_whose_program_was_killed_goes_on_with_what_it_knew(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(laptop: Laptop) -> None:
        if laptop.started and laptop.time() > 5:
            raise Killed

    with pytest.raises(Killed):
        play(tmp_path, [tiny()], FOR_EVER, looks=kill)
    after = go_on(tmp_path, DONE)
    assert after.outcomes == [(1, "Unknown"), (2, "Succeeded")]
    assert after.status().restarts == 1


def test_giving_up_while_it_waits_for_another_attempt_ends_the_run_at_once(tmp_path: Path) -> None:
    def give_up(laptop: Laptop) -> None:
        if laptop.status().next_attempt_at is not None:
            laptop.session.stop()

    laptop = play(tmp_path, [tiny()], KILLED, looks=give_up)
    assert laptop.status().finished_at is None
    assert laptop.outcomes == [(1, "Unknown")]
    assert go_on(tmp_path, DONE).outcomes == [(1, "Unknown"), (2, "Succeeded")]


def test_stopping_a_run_cancels_its_job(tmp_path: Path) -> None:
    def stop(laptop: Laptop) -> None:
        if laptop.started and not laptop.session.stopping:
            laptop.session.stop()

    laptop = play(tmp_path, [tiny()], FOR_EVER, looks=stop)
    failed = find(laptop.status().conditions, "Failed")
    assert failed is not None
    assert failed.reason == "Cancelled"
    assert laptop.outcomes == [(1, "Cancelled")]


def test_a_job_starts_from_the_model_that_another_wrote(tmp_path: Path) -> None:
    first, second = tiny(WHOLE, name="first"), tiny({"model.source": "job://first"}, name="second")
    laptop = play(tmp_path, [second, first], DONE, DONE)
    assert [one.launch.job.name for one in laptop.started] == ["first", "second"]
    plan = RunPlan.model_validate_json(laptop.started[1].launch.plan)
    assert plan.model.source == "file:///artifact"
    assert laptop.status(Key("default", "second")).phase is Phase.SUCCEEDED


def test_a_job_fails_with_the_one_whose_model_it_needs(tmp_path: Path) -> None:
    first, second = tiny(WHOLE, name="first"), tiny({"model.source": "job://first"}, name="second")
    laptop = play(tmp_path, [first, second], steps(1, failing(FailureClass.DATA_ERROR)))
    assert laptop.status(Key("default", "second")).failure is FailureClass.DEPENDENCY_FAILED


def test_a_run_ends_when_what_is_left_waits_for_a_suspended_job(tmp_path: Path) -> None:
    first, second = tiny(WHOLE | {"suspend": True}, name="first"), tiny({"model.source": "job://first"}, name="second")
    laptop = play(tmp_path, [first, second])
    assert laptop.status(Key("default", "first")).phase is Phase.SUSPENDED
    assert laptop.status(Key("default", "second")).phase is Phase.PENDING
    after = go_on(tmp_path, DONE, DONE)
    assert after.status(Key("default", "second")).phase is Phase.SUCCEEDED


def test_jobs_that_need_nothing_of_each_other_train_one_after_the_other(tmp_path: Path) -> None:
    running: list[int] = []

    def count(laptop: Laptop) -> None:
        running.append(sum(one.code is None for one in laptop.started))

    later = steps(5)

    def finish_after_a_while(laptop: Laptop) -> None:
        count(laptop)
        for one in laptop.started:
            if one.code is None and laptop.time() > 20 * len(laptop.started):
                one.succeed()

    names = ["one", "two", "three"]
    laptop = play(tmp_path, [tiny(name=name) for name in names], later, later, later, looks=finish_after_a_while)
    assert [one.launch.job.name for one in laptop.started] == names
    assert max(running) == 1


def test_a_job_is_not_deleted_while_its_end_is_still_to_be_told(tmp_path: Path) -> None:
    first = tiny({"lifecycle": {"ttlSecondsAfterFinished": 1}}, name="first")
    laptop = play(tmp_path, [first, tiny({"failurePolicy": {"hangTimeoutSeconds": 60}})], DONE, FOR_EVER, DONE)
    assert laptop.status(Key("default", "first")).phase is Phase.SUCCEEDED


def test_no_process_is_kept_to_look_around_in(tmp_path: Path) -> None:
    job = tiny(
        {
            "failurePolicy": {"hangTimeoutSeconds": 60, "maxRestarts": 0},
            "lifecycle": {"keepFailedClusterSeconds": 86_400},
        }
    )
    laptop = play(tmp_path, [job], FOR_EVER)
    assert laptop.status().failure is FailureClass.HANG
    assert laptop.started[0].code == 130


def test_a_runtime_that_the_job_names_is_kept_for_all_attempts(tmp_path: Path) -> None:
    laptop = play(tmp_path, [tiny({"runtimeRef": {"name": "pool"}})], KILLED, DONE)
    resolved = laptop.status().resolved
    assert resolved is not None
    assert resolved.runtime_hash is not None
