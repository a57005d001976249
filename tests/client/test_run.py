"""`finetune run` with the fake trainer: what it prints, the object at the end, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.plan import RunPlan
from finetune_client import runner

KEYS = {
    "name",
    "result",
    # The status, as kubectl shows it.
    "observedGeneration",
    "phase",
    "reason",
    "message",
    "method",
    "tuning",
    "conditions",
    "resolved",
    "progress",
    "checkpoint",
    "attempts",
    "rayJob",
    "restarts",
    "preemptions",
    "activeSeconds",
    "nextAttemptAt",
    "failure",
    "postMortem",
    "finishedAt",
    "artifacts",
    # What a person who ran it here wants to know besides.
    "failureDetails",
    "eval",
    "artifact",
    "seconds",
    "workdir",
    "log",
}


def test_a_run_ends_with_one_object_on_stdout_and_progress_on_stderr(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 0
    document = done.document
    assert set(document) == KEYS
    assert document["phase"] == "Succeeded"
    assert document["eval"] == {"lossBefore": 2.5, "lossAfter": 2.0}
    assert document["artifact"] == (tmp_path / "run" / "artifact").as_uri()
    assert document["seconds"] == {"Training": 3.25, "Exporting": 0.5}
    assert document["progress"]["step"] == 5
    assert {c["type"]: c["status"] for c in document["conditions"]} == {
        "Valid": "True",
        "Admitted": "False",
        "ClusterReady": "False",
        "Running": "False",
        "Checkpointed": "False",
        "Suspended": "False",
        "Complete": "True",
        "ArtifactsPublished": "True",
    }
    assert [(one["number"], one["outcome"]) for one in document["attempts"]] == [(1, "Succeeded")]
    assert document["resolved"]["globalBatchSize"] == 8
    assert "Training: step 3/5, loss 1.7000, 1,234 tokens/s, 2.0 s left, eval loss 2.5000" in done.stderr


def test_the_plan_that_the_trainers_read_is_in_the_runs_folder(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    finetune("run", write_job(), "--workdir", tmp_path / "run")
    plan = RunPlan.model_validate_json((tmp_path / "run" / "plan.json").read_bytes())
    assert plan.name == "tiny"
    assert "the fake trainer starts" in (tmp_path / "run" / "trainer.log").read_text()


def test_a_person_is_told_the_loss_the_artifact_and_the_next_command(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run")
    assert "eval loss  2.5000 -> 2.0000 (-20.0 %)" in done.stdout
    assert f"{(tmp_path / 'run' / 'artifact').as_uri()} (adapter, 1.5 MB)" in done.stdout
    assert "Training 3.2 s, Exporting 0.5 s" in done.stdout
    assert f"finetune export {tmp_path / 'run'} --to ./model --merge" in done.stdout
    assert f"finetune chat {tmp_path / 'run'}" in done.stdout


def test_runs_get_a_folder_of_their_own_under_runs(
    finetune: Any, write_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = finetune("run", write_job(), "-o", "json").document["workdir"]
    second = finetune("run", write_job(), "-o", "json").document["workdir"]
    assert first != second
    assert {Path(first).parent, Path(second).parent} == {tmp_path / "runs" / "tiny"}


def test_quiet_shows_no_progress(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "--quiet")
    assert "Training: step" not in done.stderr
    assert "eval loss" in done.stdout


def test_overrides_change_the_plan(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    done = finetune(
        "run", write_job(), "--workdir", tmp_path / "run", "--set", "training.maxSteps=7", "-o", "json", "-q"
    )
    assert done.document["progress"]["totalSteps"] == 7


@pytest.mark.parametrize(
    ("fake", "code", "kind", "sentence"),
    [
        ("data-error", 3, "DataError", "rows.jsonl:17: messages: must hold a message (found [])"),
        ("non-finite", 4, "NonFiniteLoss", "became NaN or infinite (NonFiniteLoss) after step 3"),
        ("crash", 1, "Unknown", "RuntimeError: the fake trainer broke"),
        ("killed", 1, "Unknown", "The trainer was killed (SIGKILL) after step 3"),
    ],
)
def test_a_failure_has_its_class_its_exit_code_and_one_clear_message(
    finetune: Any, write_job: Any, tmp_path: Path, fake: str, code: int, kind: str, sentence: str
) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "-o", "json", "--no-retry", fake=fake)
    assert done.code == code
    assert sentence in done.stderr
    assert str(tmp_path / "run" / "trainer.log") in done.stderr
    document = done.document
    assert set(document) == KEYS
    assert (document["phase"], document["failure"], document["artifact"]) == ("Failed", kind, None)
    assert document["failureDetails"]["failureClass"] == kind
    assert document["failureDetails"]["step"] == 3
    assert [(one["outcome"], one["action"]) for one in document["attempts"]] == [(kind, "Fail")]
    assert document["postMortem"]["failureClass"] == kind


def test_only_an_unknown_failure_shows_the_log(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", fake="data-error")
    assert "the fake trainer starts" not in done.stderr


def test_a_job_that_is_not_valid_starts_nothing_and_still_ends_with_an_object(
    finetune: Any, write_job: Any, tmp_path: Path
) -> None:
    job = write_job({"spec.training.globalBatchSize": 0, "spec.tuning.lora.rank": 0})
    done = finetune("run", job, "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 2
    assert set(done.document) == KEYS
    assert {problem["path"] for problem in done.document["failureDetails"]["problems"]} == {
        "spec.training.globalBatchSize",
        "spec.tuning.lora.rank",
    }
    valid = next(c for c in done.document["conditions"] if c["type"] == "Valid")
    assert (valid["status"], valid["reason"]) == ("False", "UserError")
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_seen_before_anything_starts(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    job = write_job({"spec.data.train.0.source": "file://./rows-*.jsonl"})
    done = finetune("run", job, "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 3
    [problem] = done.document["failureDetails"]["problems"]
    assert problem["file"] == str(job)
    assert problem["path"] == "spec.data.train[0].source"
    assert problem["value"] == json.dumps(f"file://{tmp_path}/rows-*.jsonl")
    assert problem["message"] == "matches no file on this machine; correct the path"
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_the_jobs_fault(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    done = finetune("run", write_job({"spec.model.source": "file:///no/such/model"}), "--workdir", tmp_path / "run")
    assert done.code == 2
    assert "spec.model.source" in done.stderr


def test_a_reward_model_that_is_not_there_is_named_by_its_place(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    rewards = [{"metric": {"kind": "bleu"}}, {"model": {"source": "file:///no/such/reward"}}]
    job = write_job({"spec.method": {"grpo": {"rewards": rewards}}, "spec.training.globalBatchSize": 8})
    done = finetune("run", job, "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 2
    [problem] = done.document["failureDetails"]["problems"]
    assert problem["path"] == "spec.method.grpo.rewards[1].model.source"
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    finetune("run", write_job(), "--workdir", tmp_path / "run")
    outcome = (tmp_path / "run" / "outcome.json").read_bytes()
    done = finetune("run", write_job(), "--workdir", tmp_path / "run")
    assert done.code == 2
    assert "holds a run already; name another folder" in done.stderr
    assert (tmp_path / "run" / "outcome.json").read_bytes() == outcome


def test_a_folder_that_cannot_be_written_is_a_storage_error(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = finetune("run", write_job(), "--workdir", tmp_path / "file" / "run", "-o", "json")
    assert done.code == 6
    assert done.document["failure"] == "StorageError"


def test_without_the_trainers_packages_the_extra_is_named(
    finetune: Any, write_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "NEEDED_PACKAGES", ("json", "no_such_package"))
    done = finetune("run", write_job(), "--workdir", tmp_path / "run")
    assert done.code == 2
    assert "not installed (no_such_package)" in done.stderr
    assert "pip install 'finetune-operator[trainers]'" in done.stderr


def test_a_damaged_report_does_not_end_the_run(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    done = finetune("run", write_job(), "--workdir", tmp_path / "run", "-o", "json", fake="noise")
    assert done.document["phase"] == "Succeeded"


def test_one_of_several_jobs_is_chosen_by_name(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    other = write_job({"metadata.name": "other"}, name="other.yaml").read_text()
    file.write_text(write_job().read_text() + "---\n" + other)
    refused = finetune("run", file, "--workdir", tmp_path / "run")
    assert refused.code == 2
    assert "holds 2 jobs; choose one with --job: tiny, other" in refused.stderr
    done = finetune("run", file, "--workdir", tmp_path / "run", "--job", "other", "-o", "json")
    assert done.document["name"] == "other"
