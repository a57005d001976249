"""A run that shares nothing but a bucket with the attempt before it and the job after it; the S3 server is real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune_api.failures import FailureClass
from finetune_api.plan import RunPlan
from finetune_api.progress import Progress, Result
from finetune_trainers.buckets import fetch_artifact
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.places import cache_folder
from finetune_trainers.ray_workers import _last_attempt, _saved_step
from tests.cluster.s3 import S3
from tests.factories import runtime
from tests.trainers.checkpoint.s3_faults import faulty_endpoint
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.control_plane, *WHEN_TRAINING]


def in_storage(plan: RunPlan, storage: str) -> RunPlan:
    """As it is planned for a runtime with this storage."""
    assert plan.checkpoint is not None
    below = f"{runtime({'storage': storage}).spec.storage}/{plan.namespace}/{plan.name}"
    checkpoint = plan.checkpoint.model_copy(update={"uri": f"{below}/checkpoints"})
    return plan.model_copy(update={"storage": below, "checkpoint": checkpoint})


def reports(workdir: Path) -> list[Progress]:
    lines = (workdir / "progress.jsonl").read_text().splitlines()
    return [Progress.model_validate_json(line) for line in lines]


def trained_and_killed(plan: RunPlan, workdir: Path) -> int:
    """Starts a run as its pod would, and kills it some time after a checkpoint -> steps in the newest."""
    workdir.mkdir()
    (workdir.parent / "plan.json").write_text(plan.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "finetune_trainers", "run", "--no-ray"]
    command += ["--plan", str(workdir.parent / "plan.json"), "--workdir", str(workdir)]
    assert plan.checkpoint is not None
    assert plan.checkpoint.uri is not None
    storage = open_storage(plan.checkpoint.uri, exclusive=True)
    with subprocess.Popen(command, env=os.environ | {"FINETUNE_ATTEMPT": "1"}) as process:
        try:
            while find_newest(storage).manifest is None:
                assert process.poll() is None, (workdir / "trainer.log").read_text()
                time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGKILL)
    newest = find_newest(storage).manifest
    assert newest is not None
    return newest.intent.step


def test_a_killed_run_goes_on_from_the_bucket_alone_and_the_next_job_from_its_artifact(
    small_world: SmallWorld, server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"s3://{server.bucket()}/runs"
    endless = in_storage(small_world.plan({"training.maxSteps": 100_000, "checkpoint": {"everySteps": 5}}), storage)
    killed_at = trained_and_killed(endless, tmp_path / "first")
    assert _saved_step(endless, tmp_path / "head", 0) >= killed_at, "a pod that sees none of the workers' files"
    assert _saved_step(endless, tmp_path / "head", _last_attempt(endless)) == -1, "what was there before is no progress"
    for gone in ("first", "cache"):
        shutil.rmtree(tmp_path / gone)

    monkeypatch.setenv("FINETUNE_ATTEMPT", "2")
    # Further than what the killed run's writer may still have had to write.
    steps = endless.optimization.model_copy(update={"max_steps": killed_at + 200})
    outcome = small_world.train(endless.model_copy(update={"optimization": steps}), tmp_path / "second")
    assert outcome.result is Result.SUCCEEDED, outcome.failure
    seen = reports(tmp_path / "second")
    assert max(one.resumed_from_step or 0 for one in seen) >= killed_at >= 5
    saved = next(one.checkpoint for one in reversed(seen) if one.checkpoint is not None)
    assert saved.uri.startswith(f"{storage}/default/example/checkpoints/ckpt/")
    [artifact] = outcome.artifacts
    assert (artifact.uri, artifact.kind) == (f"{storage}/default/example/attempt-2/artifact", "model")

    shutil.rmtree(tmp_path / "second")
    prepared = small_world.prepare(small_world.plan({"model.source": artifact.uri}), tmp_path / "third")
    assert Path(prepared.model.folder) == cache_folder() / "artifacts" / artifact.digest


def test_adapters_go_to_the_storage_and_the_model_that_they_are_merged_into_to_its_output(
    small_world: SmallWorld, server: S3, tmp_path: Path
) -> None:
    bucket = server.bucket()
    merged = {"outputs": [{"to": f"s3://{bucket}/merged/", "merge": True}]}
    plan = in_storage(small_world.plan({"tuning": {"lora": {}}, "checkpoint": {}} | merged), f"s3://{bucket}/runs")
    outcome = small_world.train(plan, tmp_path / "run")
    assert [(one.uri, one.kind) for one in outcome.artifacts] == [
        (f"s3://{bucket}/runs/default/example/attempt-1/artifact", "adapter"),
        (f"s3://{bucket}/merged", "model"),
    ]
    adapter, model = (fetch_artifact(one.uri, "spec.model.source") for one in outcome.artifacts)
    assert (adapter / "adapter_model.safetensors").is_file()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in model.iterdir()}


def test_a_job_tells_once_that_its_store_does_not_honour_conditional_writes(
    small_world: SmallWorld, server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"training.maxSteps": 4, "checkpoint": {"everySteps": 2, "whenBehind": "wait"}}
    plan = in_storage(small_world.plan(settings), f"s3://{server.bucket()}/runs")
    with faulty_endpoint(server.endpoint) as endpoint:
        endpoint.choose = lambda number, what: "unconditional"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        outcome = small_world.train(plan, tmp_path / "run")
    assert outcome.result is Result.SUCCEEDED, outcome.failure
    seen = reports(tmp_path / "run")
    assert max(one.checkpoint.step for one in seen if one.checkpoint is not None) == 4
    told = {one.message for one in seen if one.message and "does not honour conditional writes" in one.message}
    assert len(told) == 1


def test_a_bucket_that_cannot_be_used_ends_a_run_before_anything_is_read(
    small_world: SmallWorld, server: S3, tmp_path: Path
) -> None:
    plan = in_storage(small_world.plan({"checkpoint": {}}), "s3://no-such-bucket/runs")
    outcome = small_world.train(plan, tmp_path / "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    assert outcome.failure.problems[0].path == "FineTuneRuntime.spec.storage"
    assert not (tmp_path / "run" / "prepared.json").exists()
