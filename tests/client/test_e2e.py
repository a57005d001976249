"""The command line with the real trainers: Ray Train, two workers, a tiny random Llama."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from finetune_api.plan import RunPlan
from finetune_client.cli.exits import SUSPENDED
from finetune_client.processes import RUN_MARK
from tests.client.conftest import Finished, is_alive, wait_until
from tests.factories import job_document
from tests.trainers.factories import tiny_model, write_pairs, write_rows
from tests.trainers.online.online_world import write_prompts

pytestmark = pytest.mark.e2e

FINETUNE = [sys.executable, "-m", "finetune_client"]


@dataclass(frozen=True)
class World:
    """A model, data, a manifest, and the cache that the tests of this module share."""

    folder: Path

    def write_job(self, name: str, changes: dict[str, Any]) -> Path:
        document = job_document(
            {
                "model.source": "file://./model",
                "data": {"train": [{"source": "file://./rows.jsonl"}], "eval": [{"source": "file://./eval.jsonl"}]},
                "method": {"sft": {"maxSeqLength": 128}},
                "tuning": {"lora": {"rank": 4, "targetModules": ["all-linear"]}},
                "training": {"maxSteps": 6, "globalBatchSize": 8, "learningRate": 0.01},
                "cluster": {"workers": {"replicas": 2, "cpus": 1}},
            }
            | changes,
            name=name,
        )
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(document))
        return file

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*FINETUNE, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"FINETUNE_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"},
        )

    def finetune(self, *arguments: str | Path) -> Finished:
        return finish(self.start(*arguments))


def finish(process: subprocess.Popen[str]) -> Finished:
    stdout, stderr = process.communicate(timeout=600)
    return Finished(process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 64)
    write_rows(folder / "eval.jsonl", 8, seed=1)
    return World(folder)


@pytest.fixture(scope="module")
def trained(world: World) -> Finished:
    return world.finetune(
        "run", world.write_job("tiny", {}), "--workdir", world.folder / "run", "-o", "json", "--set", "training.seed=3"
    )


def begin_long_run(
    world: World, name: str, *options: str, changes: Mapping[str, Any] | None = None
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a run that will not end by itself; returns it, and all its processes once it trains."""
    job = world.write_job(name, {"training": {"maxSteps": 100_000, "globalBatchSize": 8}, **(changes or {})})
    process = world.start("run", job, "--workdir", world.folder / name, "-o", "json", *options)
    reports = world.folder / name / "progress.jsonl"
    wait_until(
        lambda: process.poll() is not None or (reports.exists() and '"step":2' in reports.read_text()), seconds=300
    )
    assert process.poll() is None, process.communicate()
    return process, psutil.Process(process.pid).children(recursive=True)


def with_mark(mark: str) -> list[psutil.Process]:
    """The processes that carry a run's mark, wherever they are in the tree."""
    return [process for process in psutil.process_iter() if mark_of(process) == mark]


def mark_of(process: psutil.Process) -> str | None:
    """None for one that has none, or is gone by now: Ray starts some that end at once."""
    try:
        return process.environ().get(RUN_MARK)
    except psutil.Error:
        return None


def test_a_job_becomes_an_artifact(world: World, trained: Finished) -> None:
    assert trained.code == 0, trained.stderr
    document = trained.document
    assert (document["phase"], document["failure"]) == ("Succeeded", None)
    assert document["eval"]["lossAfter"] < document["eval"]["lossBefore"]
    assert document["progress"]["step"] == 6
    assert "Training" in document["seconds"]
    folder = Path(document["artifact"].removeprefix("file://"))
    assert folder == world.folder / "run" / "artifact"
    assert (folder / "adapter_model.safetensors").is_file()
    assert "step 6/6" in trained.stderr


def test_the_artifact_is_exported_merged(world: World, trained: Finished) -> None:
    done = world.finetune("export", world.folder / "run", "--to", world.folder / "merged", "--merge", "-o", "json")
    assert done.code == 0, done.stderr
    assert done.document["artifact"] == f"file://{world.folder}/merged"
    assert (world.folder / "merged" / "config.json").is_file()


def test_the_artifact_answers(world: World, trained: Finished) -> None:
    done = world.finetune("chat", world.folder / "run", "one two cat", "--compare-base", "--max-new-tokens", "8")
    assert done.code == 0, done.stderr
    assert done.stdout.strip()


def test_validate_with_data_accepts_the_job(world: World) -> None:
    done = world.finetune("validate", world.write_job("checked", {}), "--data", "-o", "json")
    assert (done.code, done.document) == (0, {"valid": True, "errors": []}), done.stderr


def test_broken_data_ends_the_run_before_any_worker_with_its_line(world: World) -> None:
    rows = world.folder / "broken.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    job = world.write_job("broken", {"data.train": [{"source": "file://./broken.jsonl"}]})
    done = world.finetune("run", job, "--workdir", world.folder / "broken", "-o", "json")
    assert done.code == 3, done.stderr
    assert done.document["failure"] == "DataError"
    [problem] = done.document["failureDetails"]["problems"]
    assert problem["file"].endswith("broken.jsonl:2")
    assert "broken.jsonl:2" in done.stderr
    assert "Traceback" not in done.stderr
    assert "StartingWorkers" not in (world.folder / "broken" / "progress.jsonl").read_text()
    checked = world.finetune("validate", job, "--data", "-o", "json")
    assert checked.code == 3
    assert [error["file"] for error in checked.document["errors"]] == [problem["file"]]


def test_ctrl_c_stops_the_run_and_leaves_nothing(world: World) -> None:
    process, children = begin_long_run(world, "interrupted")
    [mark] = {mark for child in children if (mark := mark_of(child))}
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130, done.stderr
    assert done.document["result"] == "Cancelled"
    assert json.loads((world.folder / "interrupted" / "outcome.json").read_text())["result"] == "Cancelled"
    assert [child for child in children if is_alive(child.pid)] == []
    assert with_mark(mark) == []


def trainer_among(children: list[psutil.Process]) -> psutil.Process:
    return next(child for child in children if {"finetune_trainers", "run"} <= set(words_of(child)))


def words_of(process: psutil.Process) -> list[str]:
    """Its command; none of one that is gone by now."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def reports_in(folder: Path) -> list[dict[str, Any]]:
    """What the trainers of the folder's last attempt have reported so far, in whole lines."""
    file = folder / "progress.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def saved_in(folder: Path) -> int:
    """Steps in the newest checkpoint that was reported; 0 without one."""
    return max((report.get("checkpoint", {}).get("step", 0) for report in reports_in(folder)), default=0)


def steps_made_in(folder: Path) -> list[int]:
    """The numbers of the steps that the folder's last attempt made."""
    figures = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [one["step"] for one in figures if "loss" in one["metrics"]]


LONG = {"maxSteps": 200, "globalBatchSize": 8}
UNJUDGED = {"data": {"train": [{"source": "file://./rows.jsonl"}]}}
"""Without evaluations, of which a few rows would make one every third step."""
ALONE = {"cluster": {"workers": {"replicas": 1, "cpus": 2}}}
"""One process and no Ray, where it does not matter who trains: Ray's start takes most of a minute."""


def test_after_a_kill_the_next_attempt_goes_on_from_the_last_checkpoint(world: World) -> None:
    folder = world.folder / "resumed"
    job = world.write_job("resumed", UNJUDGED | {"training": LONG, "checkpoint": {"everySteps": 5}})
    process = world.start(
        *("run", job, "--workdir", folder, "-o", "json", "--set", "failurePolicy.backoff.initialSeconds=1")
    )
    wait_until(lambda: process.poll() is not None or saved_in(folder) >= 10, seconds=300)
    assert process.poll() is None, process.communicate()
    children = psutil.Process(process.pid).children(recursive=True)
    trainer_among(children).kill()
    done = finish(process)
    assert done.code == 0, done.stderr
    document = done.document
    assert [(one["number"], one["outcome"]) for one in document["attempts"]] == [(1, "Unknown"), (2, "Succeeded")]
    assert (document["phase"], document["restarts"]) == ("Succeeded", 1)
    assert document["progress"]["step"] == LONG["maxSteps"]
    assert document["postMortem"]["exitCode"] == 137
    resumed = document["attempts"][1]["resumedFromStep"]
    assert resumed >= 10
    assert steps_made_in(folder)[0] == resumed + 1
    assert document["checkpoint"]["step"] == saved_in(folder) > resumed
    assert f"Attempt 2 goes on after step {resumed}" in done.stderr
    assert "Trying again in 1 s" in done.stderr
    assert document["artifact"] == (folder / "artifact").as_uri()
    assert (folder / "artifact" / "adapter_model.safetensors").is_file()
    assert not (folder / "attempt-1" / "artifact").exists()
    assert [child for child in children if is_alive(child.pid)] == []


def test_a_suspended_run_saves_and_goes_on_after_the_step_that_it_had_come_to(world: World) -> None:
    folder = world.folder / "suspended"
    job = world.write_job("suspended", UNJUDGED | ALONE | {"training": LONG, "checkpoint": {"everySteps": 100_000}})
    done = world.finetune("run", job, "--workdir", folder, "-o", "json", "--suspend-after", "5")
    assert done.code == SUSPENDED, done.stderr
    checkpoint = done.document["checkpoint"]
    assert checkpoint["step"] == steps_made_in(folder)[-1] >= 5
    assert f"The next attempt goes on after step {checkpoint['step']}." in done.stderr
    done = world.finetune("run", "--resume", folder, "-o", "json")
    assert done.code == 0, done.stderr
    attempts = [(one["outcome"], one["resumedFromStep"]) for one in done.document["attempts"]]
    assert attempts == [("Suspended", 0), ("Succeeded", checkpoint["step"])]
    assert steps_made_in(folder)[0] == checkpoint["step"] + 1
    assert done.document["progress"]["step"] == LONG["maxSteps"]


def test_a_killed_trainer_is_a_failure_and_leaves_nothing(world: World) -> None:
    process, children = begin_long_run(world, "killed", "--no-retry", changes=ALONE)
    trainer_among(children).kill()
    done = finish(process)
    assert done.code == 1
    assert done.document["failure"] == "Unknown"
    assert "SIGKILL" in done.document["failureDetails"]["message"]
    assert [child for child in children if is_alive(child.pid)] == []


CHAIN = Path(__file__).parents[2] / "manifests" / "samples" / "rlhf-chain"
TINY = {"sft": {"maxSeqLength": 128}, "reward": {"maxSeqLength": 128}, "ppo": {"maxSeqLength": 128}}


def test_the_sample_of_a_chain_runs_from_its_folder_by_one_command(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the sample's first lines tell, with a smaller model and shorter texts."""
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(tmp_path / "claims"))
    data, folder = tmp_path / "claims" / "finetune" / "data", tmp_path / "chain"
    data.mkdir(parents=True)
    folder.mkdir()
    write_rows(data / "support.jsonl", 8)
    write_pairs(data / "preferences.jsonl", 8)
    write_prompts(data / "prompts.jsonl", 8)
    for file in CHAIN.glob("*.yaml"):
        document = yaml.safe_load(file.read_text())
        if document["kind"] == "FineTuneJob":
            spec = document["spec"]
            if not spec["model"]["source"].startswith("job://"):
                spec["model"]["source"] = (world.folder / "model").as_uri()
            [method] = spec["method"]
            spec["method"][method] |= TINY[method]
            spec["training"] = {"maxSteps": 2, "globalBatchSize": 2}
        (folder / file.name).write_text(yaml.safe_dump(document))
    done = world.finetune("run", "-f", folder, "--workdir", tmp_path / "run", "-o", "json")
    assert done.code == 0, done.stderr
    documents = {one["name"]: one for one in done.document["jobs"]}
    assert {name: one["phase"] for name, one in documents.items()} == dict.fromkeys(
        ("rlhf-chain-sft", "rlhf-chain-reward", "rlhf-chain"), "Succeeded"
    )
    plan = RunPlan.model_validate_json((tmp_path / "run" / "rlhf-chain" / "plan.json").read_bytes())
    assert plan.model.source == documents["rlhf-chain-sft"]["artifact"]
    assert plan.method.ppo is not None
    [reward] = plan.method.ppo.rewards
    assert reward.model is not None
    assert reward.model.source == documents["rlhf-chain-reward"]["artifact"]
