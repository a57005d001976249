"""The same optimizer steps as plain transformers and torch, whatever the engine, the tuning and the number of workers.

Runs of one worker are made in this process; those of two share one Ray Train group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainers.ray_workers import RayWorkers
from finetune_trainers.worker import artifact_folder
from tests.trainers import reference
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.parity_group import train_all

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

STEPS = 20
TOLERANCE = 1e-4
ROOT = Path(__file__).parents[2]
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"full": {}},
    "lora": {"lora": {"rank": 4, "alpha": 8, "targetModules": ["all-linear"]}},
}
BASE: dict[str, Any] = {
    "method": {"sft": {"maxSeqLength": 64}},
    "training": {
        "maxSteps": STEPS,
        "globalBatchSize": 8,
        "learningRate": 0.003,
        "schedule": "linear",
        "warmupFraction": 0.2,
        "optimizer": {"weightDecay": 0.1},
        "precision": "fp32",
        "seed": 7,
    },
}
ENGINE = {"wall_clock_breakdown": False}
"""Any key of DeepSpeed's own makes planning choose DeepSpeed for stage 0 on one worker too."""


def changes(tuning: str, stage: int | None, workers: int, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    deepspeed = {} if stage is None else {"deepspeed": {"zeroStage": stage, "config": ENGINE}}
    replicas = {"cluster": {"workers": {"replicas": workers, "cpus": 1}}}
    return BASE | {"tuning": TUNINGS[tuning]} | deepspeed | replicas | dict(more or {})


OF_ONE = {
    **{f"torch-{tuning}": changes(tuning, None, 1) for tuning in TUNINGS},
    **{f"zero{stage}-{tuning}": changes(tuning, stage, 1) for stage in range(4) for tuning in TUNINGS},
    "torch-full-8x1": changes("full", None, 1, {"training.microBatchSize": 8}),
    "torch-full-1x8": changes("full", None, 1, {"training.microBatchSize": 1}),
    "zero3-full-1x8": changes("full", 3, 1, {"training.microBatchSize": 1}),
    "zero2-full-1x8": changes("full", 2, 1, {"training.microBatchSize": 1}),
    "torch-full-checkpointing": changes("full", None, 1, {"training.activationCheckpointing": True}),
    "zero3-full-checkpointing": changes("full", 3, 1, {"training.activationCheckpointing": True}),
    "zero3-lora-checkpointing": changes("lora", 3, 1, {"training.activationCheckpointing": True}),
    "zero2-full-offload": changes("full", 2, 1, {"deepspeed.offload": {"optimizer": "cpu"}}),
    "zero3-full-offload": changes("full", 3, 1, {"deepspeed.offload": {"optimizer": "cpu", "parameters": "cpu"}}),
}
OF_TWO = {
    **{f"zero{stage}-{tuning}": changes(tuning, stage, 2) for stage in range(4) for tuning in TUNINGS},
    "zero0-full-1x4": changes("full", 0, 2, {"training.microBatchSize": 1}),
    "zero2-full-1x4": changes("full", 2, 2, {"training.microBatchSize": 1}),
    "zero3-full-1x4": changes("full", 3, 2, {"training.microBatchSize": 1}),
    "zero3-full-checkpointing": changes("full", 3, 2, {"training.activationCheckpointing": True}),
    "zero3-full-offload": changes("full", 3, 2, {"deepspeed.offload": {"optimizer": "cpu", "parameters": "cpu"}}),
}
BF16 = {f"zero{stage}-full": changes("full", stage, 2, {"training.precision": "bf16"}) for stage in range(4)}


def tuning_of(name: str) -> str:
    return "lora" if "lora" in name else "full"


Curve = list[dict[str, float]]


@pytest.fixture(scope="module")
def expected(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """The reference's curves by tuning."""
    curves = {}
    for tuning in TUNINGS:
        plan = small_world.plan(changes(tuning, None, 1))
        curves[tuning] = reference.train(plan, small_world.prepare(plan, tmp_path_factory.mktemp("reference")))
    return curves


@pytest.fixture(scope="module")
def two_workers(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs of two workers, each in a folder of its name."""
    workdir = tmp_path_factory.mktemp("two-workers")
    plans = {name: small_world.plan(spec) for name, spec in OF_TWO.items()}
    plans |= {f"bf16-{name}": small_world.plan(spec) for name, spec in BF16.items()}
    prepared = None
    for name, plan in plans.items():
        (workdir / name).mkdir()
        prepared = small_world.prepare(plan, workdir / name)
    assert prepared is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        with RayWorkers(plans["zero3-full"], train_all) as ray:
            ray.run(prepared, workdir, lambda future: future.result())
    return workdir


def assert_same(curve: Curve, wanted: Curve, tolerance: float = TOLERANCE) -> None:
    assert len(curve) == len(wanted) == STEPS
    for step, (ours, theirs) in enumerate(zip(curve, wanted, strict=True), start=1):
        for figure in ("loss", "grad_norm"):
            assert ours[figure] == pytest.approx(theirs[figure], abs=tolerance), f"{figure} of step {step}"


def test_the_reference_learns(expected: dict[str, Curve]) -> None:
    """Curves that do not move would agree about anything."""
    assert all(curve[-1]["loss"] < curve[0]["loss"] - 0.1 for curve in expected.values())


@pytest.mark.parametrize("name", OF_ONE)
def test_one_worker_makes_the_steps_of_the_reference(
    name: str, small_world: SmallWorld, expected: dict[str, Curve], tmp_path: Path
) -> None:
    outcome = small_world.train(small_world.plan(OF_ONE[name]), tmp_path / "run")
    assert outcome.failure is None, outcome.failure
    assert_same(reference.metrics_of(tmp_path / "run"), expected[tuning_of(name)])


@pytest.mark.ray
@pytest.mark.parametrize("name", OF_TWO)
def test_two_workers_make_the_steps_of_the_reference(name: str, two_workers: Path, expected: dict[str, Curve]) -> None:
    assert_same(reference.metrics_of(two_workers / name), expected[tuning_of(name)])


@pytest.mark.ray
@pytest.mark.parametrize("name", BF16)
def test_two_workers_in_bf16_stay_near_the_reference(name: str, two_workers: Path, expected: dict[str, Curve]) -> None:
    curve = reference.metrics_of(two_workers / f"bf16-{name}")
    for ours, theirs in zip(curve, expected["full"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)


@pytest.mark.ray
def test_no_run_of_two_workers_failed(two_workers: Path) -> None:
    ended = {path: json.loads(path.read_text()) for path in two_workers.glob("*/ended-*.json")}
    assert len(ended) == 2 * (len(OF_TWO) + len(BF16))
    assert [path for path, how in ended.items() if how["failure"]] == []


@pytest.mark.ray
@pytest.mark.parametrize("name", ["zero1-full", "zero3-full", "zero3-lora"])
def test_the_artifact_of_two_workers_is_that_of_one(
    name: str, two_workers: Path, small_world: SmallWorld, tmp_path: Path
) -> None:
    small_world.train(small_world.plan(OF_ONE[f"torch-{tuning_of(name)}"]), tmp_path / "run")
    file = "adapter_model.safetensors" if tuning_of(name) == "lora" else "model.safetensors"
    one = load_file(artifact_folder(tmp_path / "run") / file)
    two = load_file(artifact_folder(two_workers / name) / file)
    assert one.keys() == two.keys()
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], atol=1e-4, rtol=0)
