"""Whole runs in this process: what they leave, how they end, and that nothing starts when something is wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.failures import FailureClass
from finetune_api.progress import Outcome, Progress, Result, Stage
from finetune_trainers import launch, worker
from finetune_trainers.context import STOP_FILE, SingleProcessContext
from finetune_trainers.data.batches import eval_batches
from finetune_trainers.errors import classified
from finetune_trainers.evaluation import evaluate
from finetune_trainers.launch import count_steps
from finetune_trainers.models import load_model
from finetune_trainers.prepared import PreparedRun
from tests.trainers.conftest import SmallWorld
from tests.trainers.factories import tiny_model, tiny_plan, write_rows


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that starts fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(worker, "run", refuse)


def reports(run: Path) -> list[Progress]:
    return [Progress.model_validate_json(line) for line in (run / "progress.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_plan_figures_artifact_and_outcome(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = small_world.plan(evaluated=True)
    outcome = small_world.train(plan, tmp_path / "run")
    assert (outcome.result, outcome.step, outcome.total_steps) == (Result.SUCCEEDED, 3, 3)
    assert outcome.eval is not None
    assert outcome.eval.loss_after is not None
    assert outcome.eval.loss_before is not None
    assert outcome.eval.loss_after < outcome.eval.loss_before
    assert Outcome.model_validate_json((tmp_path / "run" / "outcome.json").read_bytes()) == outcome
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "artifact",
        "metrics.jsonl",
        "outcome.json",
        "plan.json",
        "prepared.json",
        "progress.jsonl",
    }
    assert set(outcome.seconds) == {stage for stage in Stage if stage is not Stage.DONE}


def test_progress_passes_through_the_stages_in_order(small_world: SmallWorld, tmp_path: Path) -> None:
    small_world.train(small_world.plan(evaluated=True), tmp_path)
    stages = [report.stage for report in reports(tmp_path)]
    firsts = [stage for place, stage in enumerate(stages) if stage not in stages[:place]]
    assert firsts == list(Stage)
    assert [report.step for report in reports(tmp_path) if report.stage is Stage.TRAINING][-1] == 3


def test_the_best_model_is_the_artifact_and_its_loss_is_the_loss_after(small_world: SmallWorld, tmp_path: Path) -> None:
    """A learning rate that overshoots: the model is best early and then gets worse."""
    changes = {
        "training.maxSteps": 40,
        "training.learningRate": 0.1,
        "training.schedule": "constant",
        "training.evalEverySteps": 1,
        "training.earlyStopping": {"patience": 2},
    }
    plan = small_world.plan(changes, evaluated=True)
    outcome = small_world.train(plan, tmp_path)
    assert (outcome.result, outcome.stopped_early) == (Result.SUCCEEDED, True)
    assert outcome.step < 40
    assert outcome.eval is not None
    assert outcome.metrics["eval_loss"] > (outcome.eval.loss_after or math.inf)
    prepared = PreparedRun.model_validate_json((tmp_path / "prepared.json").read_bytes())
    best = prepared.model.model_copy(update={"folder": str(tmp_path / "artifact")})
    model = load_model(best, plan, torch.device("cpu"))
    figures = evaluate(model, eval_batches(prepared.data, 4, 1, 0), SingleProcessContext(plan, tmp_path))
    assert figures["eval_loss"] == pytest.approx(outcome.eval.loss_after, abs=1e-5)


def test_frozen_parameters_are_in_the_artifact_bit_for_bit(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = small_world.plan({"tuning": {"freeze": {"train": ["model.layers.1.*"]}}})
    assert small_world.train(plan, tmp_path).result is Result.SUCCEEDED
    before = load_file(small_world.model / "model.safetensors")
    after = load_file(tmp_path / "artifact" / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if not name.startswith("model.layers.1.")} == same


def test_outputs_get_copies_of_the_artifact(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = small_world.plan({"outputs": [{"to": f"file://{tmp_path}/copy"}]})
    outcome = small_world.train(plan, tmp_path / "run")
    first, second = outcome.artifacts
    assert (first.uri, second.uri) == (f"file://{tmp_path}/run/artifact", f"file://{tmp_path}/copy")
    assert first.digest == second.digest
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {path.name for path in (tmp_path / "run" / "artifact").iterdir()}


def test_an_output_can_be_the_merged_model(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = small_world.plan({"tuning": {"lora": {}}, "outputs": [{"to": f"file://{tmp_path}/merged", "merge": True}]})
    outcome = small_world.train(plan, tmp_path / "run")
    assert [artifact.kind for artifact in outcome.artifacts] == ["adapter", "model"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_artifact_of_an_earlier_job_of_that_name_is_kept_beside_the_new_one(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "adapter_model.safetensors").write_text("the earlier one's")
    outcome = small_world.train(small_world.plan({"training.maxSteps": 1}), tmp_path)
    assert outcome.result is Result.SUCCEEDED, outcome.failure
    assert outcome.artifacts[0].uri == f"file://{tmp_path}/artifact"
    [kept] = tmp_path.glob("artifact-*")
    assert (kept / "adapter_model.safetensors").read_text() == "the earlier one's"


@pytest.mark.usefixtures("no_worker")
def test_an_output_that_is_there_already_is_refused_before_training(small_world: SmallWorld, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    outcome = small_world.train(small_world.plan({"outputs": [{"to": f"file://{tmp_path}/taken"}]}), tmp_path / "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    assert outcome.failure.problems[0].path == "spec.outputs[0].to"


@pytest.mark.usefixtures("no_worker")
def test_broken_rows_are_refused_before_training(small_world: SmallWorld, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    outcome = small_world.train(tiny_plan(small_world.model, rows), tmp_path / "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.DATA_ERROR
    assert outcome.failure.problems[0].file == f"{rows}:2"


@pytest.mark.usefixtures("no_worker")
def test_another_ray_in_the_image_than_the_job_says_is_refused_first_of_all(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_RAY_VERSION", "2.9.3")
    outcome = small_world.train(small_world.plan(), tmp_path / "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    [problem] = outcome.failure.problems
    assert (problem.path, problem.value) == ("spec.cluster.rayVersion", "2.9.3")
    assert f"the image has Ray {version('ray')}: set that" in problem.message
    assert {report.stage for report in reports(tmp_path / "run")} <= {Stage.DONE}


def test_a_check_trains_nothing_and_counts_the_steps(small_world: SmallWorld, tmp_path: Path) -> None:
    outcome = launch.check(small_world.plan({"training.maxSteps": 5}), tmp_path, small_world.cache)
    assert (outcome.result, outcome.total_steps, outcome.step) == (Result.SUCCEEDED, 5, 0)
    assert not (tmp_path / "artifact").exists()


def test_the_automatic_learning_rate_is_settled_when_the_model_is_known(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    plan = small_world.plan({"training.learningRate": "auto"})
    assert plan.optimization.learning_rate.peak is None
    rate = small_world.prepare(plan, tmp_path).learning_rate
    assert rate.peak == pytest.approx(6e-5)
    assert "pre-training rate" in rate.reason


@pytest.mark.parametrize(("epochs", "sequences", "steps"), [(1, 8, 2), (1, 9, 3), (3, 9, 7), (1, 1, 1)])
def test_the_last_step_of_the_last_epoch_may_be_a_small_one(
    epochs: int, sequences: int, steps: int, small_world: SmallWorld
) -> None:
    training = {"epochs": epochs, "globalBatchSize": 4, "learningRate": 0.1}
    assert count_steps(small_world.plan({"training": training}), sequences) == steps


def test_two_epochs_train_every_row_twice(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = small_world.plan({"training": {"epochs": 2, "globalBatchSize": 4, "learningRate": 0.001}})
    outcome = small_world.train(plan, tmp_path)
    prepared = PreparedRun.model_validate_json((tmp_path / "prepared.json").read_bytes())
    assert outcome.metrics["num_tokens"] == 2 * prepared.data.train[0].num_trained_tokens


def test_a_model_with_a_nan_ends_typed_and_writes_no_artifact(small_world: SmallWorld, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    outcome = small_world.train(tiny_plan(folder, rows), tmp_path / "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.NON_FINITE_LOSS
    assert (outcome.failure.step, outcome.step) == (0, 0)
    assert not (tmp_path / "run" / "artifact").exists()


def test_a_stop_request_ends_a_run_after_a_whole_step(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = small_world.plan({"training.maxSteps": 100_000})
    stop = threading.Thread(target=_stop_after, args=(tmp_path, 2))
    stop.start()
    outcome = small_world.train(plan, tmp_path)
    stop.join()
    assert outcome.result is Result.CANCELLED
    assert 2 <= outcome.step < 100_000
    assert outcome.artifacts == []


def test_ctrl_c_ends_a_run_after_a_whole_step(small_world: SmallWorld, tmp_path: Path) -> None:
    plan = small_world.plan({"training.maxSteps": 100_000})
    before = signal.getsignal(signal.SIGINT)
    stop = threading.Thread(target=_stop_after, args=(tmp_path, 2, True))
    stop.start()
    outcome = small_world.train(plan, tmp_path)
    stop.join()
    assert outcome.result is Result.CANCELLED
    assert signal.getsignal(signal.SIGINT) is before


def _stop_after(run: Path, steps: int, by_signal: bool = False) -> None:
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        time.sleep(0.01)
    if by_signal:
        signal.raise_signal(signal.SIGINT)
    else:
        (run / STOP_FILE).touch()


def test_a_fault_of_ours_is_unknown_and_names_the_log(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(worker, "run", fail)
    failure = small_world.train(small_world.plan(), tmp_path).failure
    assert failure is not None
    assert failure.failure_class is FailureClass.UNKNOWN
    assert failure.message == "KeyError: 'oops' (the traceback is in trainer.log)"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), FailureClass.OUT_OF_MEMORY),
        (MemoryError(), FailureClass.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), FailureClass.OUT_OF_MEMORY),
        (OSError(28, "No space left on device"), FailureClass.STORAGE_ERROR),
        (OSError(2, "No such file or directory"), FailureClass.UNKNOWN),
        (RuntimeError("shapes do not match"), FailureClass.UNKNOWN),
    ],
)
def test_errors_are_classified(error: BaseException, kind: FailureClass) -> None:
    assert classified(error).failure_class is kind


def test_a_file_that_may_not_be_read_is_for_a_person_to_mend_and_named() -> None:
    told = classified(PermissionError(13, "Permission denied", "/mnt/pvc/shared/model.safetensors"))
    assert told.failure_class is FailureClass.USER_ERROR
    assert "'/mnt/pvc/shared/model.safetensors' may not be used" in told.message
    assert f"number {os.geteuid()}" in told.message


def test_reports_that_come_too_soon_are_left_out_unless_urgent_or_of_a_new_stage(tmp_path: Path) -> None:
    from finetune_trainers.progress import FileSink

    times = iter([0.0, 0.1, 0.1, 0.15, 0.4])
    sink = FileSink(tmp_path / "progress.jsonl", clock=lambda: next(times))
    for step, stage, urgent in [
        (0, Stage.TRAINING, False),
        (1, Stage.TRAINING, False),
        (2, Stage.TRAINING, True),
        (3, Stage.EVALUATING, False),
        (4, Stage.EVALUATING, False),
    ]:
        sink.report(stage, urgent=urgent, step=step)
    assert [json.loads(line)["step"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()] == [0, 2, 3, 4]
