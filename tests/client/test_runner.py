"""`LocalRun`, as a program uses it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_api.failures import FailureClass
from finetune_api.progress import Result, Stage
from finetune_client.runner import LocalRun, RunFolderTaken, missing_packages, outcome_of
from finetune_operator.planning import plan_run
from tests.client.conftest import FAKE_TRAINER, is_alive
from tests.factories import job


def local_run(workdir: Path, fake: str = "", **others: Any) -> LocalRun:
    plan = plan_run(job({"training": {"maxSteps": 4}}))
    command = [sys.executable, str(FAKE_TRAINER)]
    return LocalRun(plan, workdir, command=command, environment={"FAKE_TRAINER": fake}, **others)


def test_a_program_follows_the_events_and_gets_the_outcome(tmp_path: Path) -> None:
    with local_run(tmp_path / "run") as run:
        stages = [progress.stage for progress in run.events()]
        outcome = run.wait()
    assert stages[0] is Stage.CHECKING_MODEL
    assert stages.count(Stage.TRAINING) == 4
    assert (outcome.result, outcome.step) == (Result.SUCCEEDED, 4)


def test_the_outcome_may_be_waited_for_without_following(tmp_path: Path) -> None:
    with local_run(tmp_path / "run") as run:
        assert run.wait().result is Result.SUCCEEDED
    assert run.latest is not None


def test_a_program_can_stop_a_run(tmp_path: Path) -> None:
    with local_run(tmp_path / "run", fake="waits") as run:
        for progress in run.events():
            if progress.message == "waiting":
                run.stop()
        assert run.wait().result is Result.CANCELLED


def test_a_run_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    with local_run(tmp_path / "run", fake="deaf", stop_seconds=0.2) as run:
        for progress in run.events():
            if progress.message == "waiting":
                run.stop()
        outcome = run.wait()
    assert (outcome.result, outcome.step) == (Result.CANCELLED, 3)


def test_a_run_that_saves_may_take_its_time_until_it_is_stopped_without_patience(tmp_path: Path) -> None:
    with local_run(tmp_path / "run", fake="deaf", stop_seconds=0) as run:
        for progress in run.events():
            if progress.message == "waiting":
                run.stop(patiently=True)
                run.poll()
                with pytest.raises(psutil.TimeoutExpired):
                    psutil.Process(run.pid).wait(0.5)
                run.stop()
        assert run.wait().result is Result.CANCELLED


def test_an_exception_in_the_program_ends_the_run(tmp_path: Path) -> None:
    run = local_run(tmp_path / "run", fake="waits")
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert not is_alive(run.pid)


def test_a_folder_that_holds_a_run_is_not_used_again(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("{}")
    with pytest.raises(RunFolderTaken):
        local_run(tmp_path).start()


def test_the_cache_is_told_to_the_trainers(tmp_path: Path) -> None:
    program = "import os, sys; print(os.environ['FINETUNE_CACHE']); sys.exit(2)"
    plan = plan_run(job())
    with LocalRun(plan, tmp_path / "run", cache=tmp_path / "cache", command=[sys.executable, "-c", program]) as run:
        run.wait()
    assert run.log.read_text().strip() == str(tmp_path / "cache")


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (1, FailureClass.UNKNOWN, "exit code 1 after step 7"),
        (2, FailureClass.USER_ERROR, "exit code 2"),
        (5, FailureClass.OUT_OF_MEMORY, "exit code 5"),
        (-signal.SIGKILL, FailureClass.UNKNOWN, "killed (SIGKILL) after step 7"),
        (-signal.SIGSEGV, FailureClass.UNKNOWN, "died of SIGSEGV after step 7"),
    ],
)
def test_without_an_outcome_the_exit_code_tells_the_class(
    tmp_path: Path, code: int, kind: FailureClass, words: str
) -> None:
    failure = outcome_of(tmp_path, code, stop_requested=False, step=7).failure
    assert failure is not None
    assert failure.failure_class is kind
    assert words in failure.message


def test_a_half_written_outcome_is_no_outcome(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"result": "Succ')
    assert outcome_of(tmp_path, 1, stop_requested=False, step=0).result is Result.FAILED


def test_what_was_asked_to_stop_and_said_nothing_was_cancelled(tmp_path: Path) -> None:
    assert outcome_of(tmp_path, -signal.SIGKILL, stop_requested=True, step=2).result is Result.CANCELLED


def test_missing_packages_are_found_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_client.runner.NEEDED_PACKAGES", ("json", "no_such_package"))
    assert missing_packages() == ["no_such_package"]
