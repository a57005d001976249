"""`finetune run` through several attempts, with the fake trainer: restarts, suspension, interruptions, chains."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.plan import RunPlan
from finetune_client.cli.exits import SUSPENDED
from tests.client.conftest import JOB, is_alive, wait_until
from tests.factories import with_changes

AT_ONCE = ("--set", "failurePolicy.backoff.initialSeconds=1")
FULL: dict[str, Any] = {"spec.tuning": {"full": {}}}


def outcomes(document: Any) -> list[tuple[int, str]]:
    return [(attempt["number"], attempt["outcome"]) for attempt in document["attempts"]]


def result_in(folder: Path) -> str | None:
    """What the trainers wrote last in this folder."""
    file = folder / "outcome.json"
    return json.loads(file.read_text())["result"] if file.exists() else None


def test_a_killed_trainer_is_followed_by_another_attempt(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "-o", "json", *AT_ONCE, fake="killed then ")
    assert done.code == 0
    document = done.document
    assert (document["phase"], document["restarts"], outcomes(document)) == (
        "Succeeded",
        1,
        [(1, "Unknown"), (2, "Succeeded")],
    )
    assert document["attempts"][0]["step"] == 3
    assert document["postMortem"]["exitCode"] == 137
    assert "Attempt 1 failed after step 3 (Unknown): The trainer was killed (SIGKILL) after step 3" in done.stderr
    assert "Trying again in 1 s (restart 1 of at most 3)" in done.stderr
    assert "Attempt 2 begins again at step 0: there is no checkpoint" in done.stderr


SAVES: dict[str, Any] = {"spec.checkpoint": {"everySteps": 2}}


def test_a_run_that_saves_goes_on_from_its_checkpoint_and_tells_where_it_is(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = finetune("run", write_job(SAVES), "--workdir", run, "-o", "json", *AT_ONCE, fake="killed then ")
    document = done.document
    assert outcomes(document) == [(1, "Unknown"), (2, "Succeeded")]
    assert [(one["resumedFromStep"], one["checkpointStep"]) for one in document["attempts"]] == [(0, 2), (2, 4)]
    assert document["checkpoint"]["step"] == 4
    assert document["checkpoint"]["uri"] == (run / "checkpoints" / "step-4").as_uri()
    assert f"The first checkpoint is whole, after step 2: {(run / 'checkpoints' / 'step-2').as_uri()}" in done.stderr
    assert "Attempt 2 goes on after step 2" in done.stderr
    assert {c["type"]: c["reason"] for c in document["conditions"]}["Checkpointed"] == "Saved"


def test_a_run_that_saves_is_suspended_with_a_checkpoint_and_goes_on_from_it(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    run, job = tmp_path / "run", write_job({"spec.checkpoint": {}})
    done = finetune("run", job, "--workdir", run, "--suspend-after", "3", fake="waits then ")
    assert done.code == SUSPENDED
    assert "Waiting for the trainers to save a checkpoint and to stop" in done.stderr
    assert "The next attempt goes on after step 3." in done.stderr
    assert f"The checkpoint of step 3 is {(run / 'checkpoints' / 'step-3').as_uri()} (1.5 MB)" in done.stderr
    done = finetune("run", "--resume", run, "-o", "json", fake="waits then ")
    assert done.code == 0
    assert outcomes(done.document) == [(1, "Suspended"), (2, "Succeeded")]
    assert done.document["attempts"][1]["resumedFromStep"] == 3


def test_what_workers_complain_of_after_their_driver_was_killed_is_not_the_cause(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    fake = "killed-among-workers"
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "-o", "json", "--no-retry", fake=fake)
    assert (done.code, done.document["failure"]) == (1, "Unknown")
    assert "killed (SIGKILL)" in done.document["postMortem"]["message"]


def test_the_runs_folder_shows_the_last_attempt_and_keeps_the_others(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = finetune("run", write_job(), "--workdir", run, "-o", "json", *AT_ONCE, fake="killed then non-finite")
    assert outcomes(done.document) == [(1, "Unknown"), (2, "NonFiniteLoss")]
    assert result_in(run) == "Failed"
    assert result_in(run / "attempt-1") is None
    for folder in (run, run / "attempt-1"):
        assert RunPlan.model_validate_json((folder / "plan.json").read_bytes()).name == "tiny"
        assert "the fake trainer starts" in (folder / "trainer.log").read_text()
        assert (folder / "progress.jsonl").exists()
    assert done.document["log"] == str(run / "trainer.log")


def test_the_artifact_of_a_later_attempt_is_where_chat_and_export_look(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = finetune("run", write_job(), "--workdir", run, "-o", "json", *AT_ONCE, fake="killed then ")
    assert done.document["artifact"] == (run / "artifact").as_uri()
    assert finetune("export", run, "--to", tmp_path / "model").code == 0


def test_what_fails_every_time_fails_in_the_end_and_tells_all_attempts(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    limit = ("--set", "failurePolicy.maxRestarts=1")
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "-o", "json", *AT_ONCE, *limit, fake="killed")
    assert (done.code, done.document["failure"]) == (1, "Unknown")
    assert next(c["reason"] for c in done.document["conditions"] if c["type"] == "Failed") == "MaxRestartsExceeded"
    assert "Attempts: 1 ended after step 3 (Unknown), 2 ended after step 3 (Unknown)" in done.stderr


@pytest.mark.parametrize("fake", ["data-error", "non-finite"])
def test_what_another_try_would_not_mend_is_not_tried_again(
    finetune: Any, write_job: Any, tmp_path: Path, fake: str
) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "-o", "json", fake=fake)
    assert len(done.document["attempts"]) == 1
    assert done.document["restarts"] == 0
    assert "Trying again" not in done.stderr


def test_a_run_is_suspended_after_some_steps_and_goes_on_with_the_next_attempt(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    suspended = finetune("run", write_job(), "--workdir", run, "-o", "json", "--suspend-after", "3", fake="waits")
    assert suspended.code == SUSPENDED
    assert (suspended.document["phase"], suspended.document["result"]) == ("Suspended", "Suspended")
    assert outcomes(suspended.document) == [(1, "Suspended")]
    assert suspended.document["attempts"][0]["step"] == 3
    assert "Suspending after step 3" in suspended.stderr
    assert f"finetune run --resume {run}" in suspended.stderr
    assert "Suspended after 3 of 5 steps" in suspended.stderr
    done = finetune("run", "--resume", run, "-o", "json")
    assert done.code == 0
    assert outcomes(done.document) == [(1, "Suspended"), (2, "Succeeded")]
    assert result_in(run) == "Succeeded"
    assert result_in(run / "attempt-1") == "Cancelled"


def test_only_a_run_that_has_not_ended_goes_on(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    finetune("run", write_job(), "--workdir", tmp_path / "run")
    ended = finetune("run", "--resume", tmp_path / "run", "-o", "json")
    assert ended.code == 2
    assert "has ended (tiny Succeeded); start another one" in ended.stderr
    assert ended.document["failure"] == "UserError"
    nothing = finetune("run", "--resume", tmp_path)
    assert nothing.code == 2
    assert "holds no run to go on with" in nothing.stderr
    (tmp_path / "run" / "state.json").write_text("{")
    damaged = finetune("run", "--resume", tmp_path / "run")
    assert damaged.code == 2
    assert "state.json is damaged" in damaged.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name the file with the job, or a run's folder with --resume"),
        (["FILE", "--resume", "runs"], "--resume goes on with a run as it was begun; leave out: FILE"),
        (["--resume", "runs", "--set", "training.maxSteps=9", "--no-ray"], "leave out: --set, --no-ray"),
        (["FILE", "--all", "--job", "tiny"], "--job chooses one job and --all runs every one; use one of them"),
        (["FILE", "--all", "--suspend-after", "2"], "--suspend-after is for one job; leave --all out"),
        (["-f", "FILE", "--suspend-after", "2"], "--suspend-after is for one job; leave -f out"),
        (["-f", "FILE", "--job", "tiny"], "--job chooses one job and -f runs every one; use one of them"),
        (["FILE", "-f", "FILE"], "jobs are named by FILE or by -f; use one of them"),
        (["--resume", "runs", "-f", "FILE"], "leave out: -f"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    finetune: Any, write_job: Any, arguments: list[str], sentence: str
) -> None:
    done = finetune("run", *(str(write_job()) if one == "FILE" else one for one in arguments))
    assert done.code == 2
    assert sentence in done.stderr


def test_a_job_of_another_manager_is_not_run(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    job = write_job({"spec.managedBy": "kueue.x-k8s.io/multikueue"})
    done = finetune("run", job, "--workdir", tmp_path / "run")
    assert done.code == 2
    assert "spec.managedBy gives the job to kueue.x-k8s.io/multikueue" in done.stderr


def test_ctrl_c_while_it_waits_to_try_again_gives_up_at_once(start: Any, write_job: Any) -> None:
    running = start(
        "run", write_job(), "-o", "json", "--set", "failurePolicy.backoff.initialSeconds=600", fake="killed"
    )
    wait_until(lambda: "Trying again in 10:00" in running.process.stderr.readline())
    running.process.send_signal(signal.SIGINT)
    done = running.finish()
    assert done.code == 130
    assert (done.document["result"], done.document["phase"]) == ("Cancelled", "Pending")
    assert f"finetune run --resume {running.workdir}" in done.stderr


def test_a_run_whose_command_line_was_killed_goes_on(start: Any, finetune: Any, write_job: Any) -> None:
    running = start("run", write_job(), *AT_ONCE, fake="waits")
    running.wait_for("waiting")
    trainer = running.trainer()
    wait_until(lambda: '"jobStatus": "RUNNING"' in (running.workdir / "state.json").read_text())
    running.process.kill()
    running.process.communicate()
    done = finetune("run", "--resume", running.workdir, "-o", "json")
    assert not is_alive(trainer.pid)
    assert done.code == 0, done.stderr
    assert outcomes(done.document)[-1] == (2, "Succeeded")


def write_jobs(folder: Path, *jobs: tuple[str, dict[str, Any]]) -> Path:
    """Several jobs in one file."""
    documents = [with_changes(JOB, FULL | {"metadata.name": name} | changes) for name, changes in jobs]
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    return file


def test_all_jobs_of_a_file_run_each_after_the_one_whose_model_it_starts_from(finetune: Any, tmp_path: Path) -> None:
    file = write_jobs(tmp_path, ("second", {"spec.model.source": "job://first"}), ("first", {}))
    done = finetune("run", file, "--all", "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 0, done.stderr
    documents = {one["name"]: one for one in done.document["jobs"]}
    assert [one["phase"] for one in documents.values()] == ["Succeeded", "Succeeded"]
    assert documents["second"]["workdir"] == str(tmp_path / "run" / "second")
    plan = RunPlan.model_validate_json((tmp_path / "run" / "second" / "plan.json").read_bytes())
    assert plan.model.source == documents["first"]["artifact"] == (tmp_path / "run" / "first" / "artifact").as_uri()
    assert "second: job://first" in done.stderr


def test_all_jobs_of_a_folder_run_as_those_of_a_file(finetune: Any, tmp_path: Path) -> None:
    folder = tmp_path / "chain"
    folder.mkdir()
    write_jobs(folder, ("a-second", {"spec.model.source": "job://first"})).rename(folder / "1.yaml")
    write_jobs(folder, ("first", {})).rename(folder / "2.yaml")
    done = finetune("run", "-f", folder, "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 0, done.stderr
    assert {one["name"]: one["phase"] for one in done.document["jobs"]} == {
        "a-second": "Succeeded",
        "first": "Succeeded",
    }
    plan = RunPlan.model_validate_json((tmp_path / "run" / "a-second" / "plan.json").read_bytes())
    assert plan.model.source == (tmp_path / "run" / "first" / "artifact").as_uri()


def test_two_jobs_of_one_name_are_refused_before_either_runs(finetune: Any, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    for file in ("1.yaml", "2.yaml"):
        write_jobs(folder, ("same", {})).rename(folder / file)
    done = finetune("run", "-f", folder, "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 2, done.stderr
    assert "metadata.name" in done.stderr
    assert "is the name of a job in" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_first_job_that_fails_gives_the_exit_code(finetune: Any, tmp_path: Path) -> None:
    file = write_jobs(tmp_path, ("first", {}), ("second", {"spec.model.source": "job://first"}))
    done = finetune("run", file, "--all", "--workdir", tmp_path / "run", "-o", "json", fake="data-error")
    assert done.code == 3
    assert [one["failure"] for one in done.document["jobs"]] == ["DataError", "DependencyFailed"]


@pytest.mark.parametrize(
    ("jobs", "arguments", "sentence"),
    [
        ([("a", {"spec.model.source": "job://b"}), ("b", {})], ["--job", "a"], "run all of them with -f"),
        ([("a", {"spec.model.source": "job://b"}), ("c", {})], ["--all"], "put that job into the same file"),
        (
            [("a", {"spec.model.source": "job://b"}), ("b", {"spec.model.source": "job://a"})],
            ["--all"],
            "is the artifact of a job that waits for this one",
        ),
        (
            [("a", {"spec.model.source": "job://b"}), ("b", {"spec.tuning": {"lora": {}}})],
            ["--all"],
            "give b an output with merge: true",
        ),
        (
            [("a", {"spec.model.source": "job://b"}), ("b", {"spec.method": {"reward": {}}})],
            ["--all"],
            "is a job of method reward, whose model gives scores and writes nothing",
        ),
    ],
)
def test_a_job_that_could_never_start_is_refused_before_anything_does(
    finetune: Any, tmp_path: Path, jobs: list[tuple[str, dict[str, Any]]], arguments: list[str], sentence: str
) -> None:
    done = finetune("run", write_jobs(tmp_path, *jobs), *arguments, "--workdir", tmp_path / "run")
    assert done.code == 2
    assert "spec.model.source" in done.stderr
    assert sentence in done.stderr
    assert not (tmp_path / "run").exists()
