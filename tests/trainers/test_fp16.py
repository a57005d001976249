"""fp16 with loss scaling, on every engine. People are refused it on a CPU, where it is slow and gains nothing. But
torch and DeepSpeed compute it there all the same: what happens around an overflow is tested beneath that refusal.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.plan import Device, RunPlan
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.engine_state import EngineState
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.loop import LoopMemory
from finetune_trainers.methods.building import build_method
from finetune_trainers.worker import load
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.test_resuming import Place, assert_same

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

SMALL_BUCKETS = {"wall_clock_breakdown": False, "zero_optimization": {"reduce_bucket_size": 1_000_000}}
WAYS: dict[str, dict[str, Any]] = {
    "torch": {},
    **{f"zero {stage}": {"deepspeed": {"zeroStage": stage, "config": SMALL_BUCKETS}} for stage in range(4)},
}
FIRST_SCALE = 2.0**16
HALVED_BY = {"torch": 4, "zero 0": 4, "zero 1": 2, "zero 2": 2, "zero 3": 2}
"""What two overflows divide the scale by: the stages that split something forgive the first one."""


@pytest.fixture(autouse=True)
def fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beneath the refusals: ours, and DeepSpeed's where the processor has no instructions for it."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr("finetune_trainers.model_checks._check_device", lambda plan: [])
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)


def here(plan: RunPlan) -> RunPlan:
    """What was planned for a GPU, on the CPU."""
    return plan.model_copy(update={"workers": plan.workers.model_copy(update={"gpus": 0, "device": Device.CPU})})


def planned_for_a_gpu(precision: str = "fp16") -> dict[str, Any]:
    workers = {"workers": {"gpus": 1, "cpus": 1}}
    return {"training.maxSteps": 6, "training.microBatchSize": 2, "training.precision": precision, "cluster": workers}


class Stepped:
    """An engine that is stepped by hand."""

    def __init__(self, world: SmallWorld, workdir: Path, changes: Mapping[str, Any]) -> None:
        plan = here(world.plan(planned_for_a_gpu() | dict(changes)))
        prepared = world.prepare(plan, workdir)
        context = SingleProcessContext(plan, workdir)
        _, self.engine = load(plan, prepared, context)
        self.state = EngineState(self.engine, rank=0, world_size=1)
        self.method = build_method(plan, prepared, self.engine.module, context)

    def step(self, number: int, poison: float = 1.0) -> float | None:
        """The gradient of each micro-batch is multiplied by `poison`."""
        self.engine.begin_step(0.01, 0.0)
        batches = self.method.step(number)
        assert batches is not None
        for batch in batches.micro_batches:
            loss = self.method.loss(self.engine.module, batch).total
            loss.register_hook(lambda grad: grad * poison)  # type: ignore[no-untyped-call]
            self.engine.backward(loss, batches.divisor)
        return self.engine.step()

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.parameters()}

    @property
    def scale(self) -> float:
        assert self.state.loss_scale is not None
        return self.state.loss_scale


@pytest.fixture
def stepped(small_world: SmallWorld, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Stepped] = []

    def make(way: str) -> Stepped:
        made.append(Stepped(small_world, tmp_path / str(len(made)), WAYS[way]))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_changes_nothing_but_the_scale_and_the_next_step_is_made(way: str, stepped: Any) -> None:
    one = stepped(way)
    assert one.scale == FIRST_SCALE
    assert math.isfinite(one.step(0))
    before = one.parameters()
    assert [one.step(number, poison=math.inf) for number in (1, 2)] == [None, None]
    after = one.parameters()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert one.scale == FIRST_SCALE / HALVED_BY[way]
    assert math.isfinite(one.step(3))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in one.parameters().items())


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_that_is_put_back_is_the_one_that_is_used(way: str, stepped: Any) -> None:
    one = stepped(way)
    one.state.loss_scale = 2.0**9
    assert one.scale == 2.0**9
    assert math.isfinite(one.step(0))
    for number in (1, 2):
        one.step(number, poison=math.inf)
    assert one.scale == 2.0**9 / HALVED_BY[way]


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_that_is_put_back_with_its_counts_changes_when_it_would_have(
    way: str, stepped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, growth_interval=4))
    monkeypatch.setitem(
        WAYS, way, WAYS[way] | ({} if way == "torch" else {"deepspeed.config.fp16.loss_scale_window": 4})
    )
    before, after = [math.inf, 1.0, 1.0], [1.0, 1.0, math.inf, *[1.0] * 5]
    whole = stepped(way)
    scales_of(whole, before)
    scale, counts = whole.scale, whole.state.loss_scale_counts
    scales = scales_of(whole, after)
    assert len(set(scales)) > 1
    whole.engine.close()
    rest = stepped(way)
    rest.state.loss_scale, rest.state.loss_scale_counts = scale, counts
    assert scales_of(rest, after) == scales


def scales_of(one: Stepped, poisons: Sequence[float]) -> list[float]:
    """After each step."""
    scales = []
    for number, poison in enumerate(poisons):
        one.step(number, poison)
        scales.append(one.scale)
    return scales


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_without_counts_or_with_those_of_another_engine_is_taken(way: str, stepped: Any) -> None:
    one = stepped(way)
    one.step(0)
    before = one.state.loss_scale_counts
    for counts in ({}, {"of_another_engine": 3}):
        one.state.loss_scale_counts = counts
        assert one.state.loss_scale_counts == before


@pytest.mark.parametrize("way", WAYS)
def test_steps_in_fp16_are_those_of_fp32_but_for_their_rounding(
    way: str, small_world: SmallWorld, tmp_path: Path
) -> None:
    """Loss and norm are told without the scale, whoever has multiplied it in."""
    figures = {}
    for precision in ("fp32", "fp16"):
        plan = here(small_world.plan(planned_for_a_gpu(precision) | WAYS[way]))
        assert small_world.train(plan, tmp_path / precision).failure is None
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line)["metrics"] for line in lines]
        figures[precision] = [(one["loss"], one["grad_norm"]) for one in metrics if "loss" in one]
    assert len(figures["fp16"]) == 6
    for ours, exact in zip(figures["fp16"], figures["fp32"], strict=True):
        assert ours == pytest.approx(exact, rel=0.01)
    assert figures["fp16"] != figures["fp32"]


@pytest.mark.parametrize("way", ["torch", "zero 2"])
def test_a_run_goes_on_with_the_scale_that_it_had_found_to_the_bit(
    way: str, small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale begins so high that the first steps overflow: a run that began with it again would lose others."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    config = {"deepspeed.config.fp16.initial_scale_power": 24} if way != "torch" else {}
    place = Place(small_world, tmp_path)
    plan = here(place.plan(planned_for_a_gpu() | {"training.maxSteps": 20} | WAYS[way] | config))
    assert place.train(plan, "whole").failure is None
    assert len(place.figures("whole", "grad_norm")) < len(place.figures("whole"))
    at_the_end = scaling_of(place)
    place.forget(20)
    assert place.train(plan, "rest").failure is None
    assert place.resumed_from("rest") == 10
    for figure in ("loss", "grad_norm"):
        whole = place.figures("whole", figure)
        assert place.figures("rest", figure) == {step: value for step, value in whole.items() if step > 10}
    assert_same(place.artifact("rest"), place.artifact("whole"))
    assert scaling_of(place) == at_the_end


def scaling_of(place: Place) -> tuple[float | None, dict[str, int]]:
    """As the newest checkpoint has it."""
    manifest = find_newest(place.storage).manifest
    assert manifest is not None
    assert manifest.intent.step == 20
    memory = LoopMemory.model_validate_json(place.storage.read(f"{layout.folder(manifest.id)}aux-00000-loop.json"))
    assert memory.loss_scale_counts
    return memory.loss_scale, memory.loss_scale_counts
