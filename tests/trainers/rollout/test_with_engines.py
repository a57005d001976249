"""Answers by what an engine has made of the model, and what training is like after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune_trainers.context import SingleProcessContext
from finetune_trainers.methods.building import build_method
from finetune_trainers.rollout import Completion, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from finetune_trainers.rollout.zero3 import fits_whole, gathered, is_split, parameters_but
from finetune_trainers.worker import load
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.rollout.writers import PROMPTS, requests_for

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

DRAWN = Sampling(max_new_tokens=12, temperature=0.9)
LORA = {"tuning": {"lora": {"rank": 4, "alpha": 8, "targetModules": ["q_proj", "v_proj"]}}}
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    **{
        f"zero{stage}": {"deepspeed": {"zeroStage": stage, "config": {"wall_clock_breakdown": False}}}
        for stage in range(4)
    },
}


class Trained:
    """An engine that is stepped by hand, and writes in between."""

    def __init__(self, world: SmallWorld, workdir: Path, changes: Mapping[str, Any]) -> None:
        plan = world.plan({"training.maxSteps": 6} | dict(changes))
        prepared = world.prepare(plan, workdir)
        self.context = SingleProcessContext(plan, workdir)
        self.tuned, self.engine = load(plan, prepared, self.context)
        self.method = build_method(plan, prepared, self.engine.module, self.context)

    def step(self, number: int) -> None:
        self.engine.begin_step(0.01, 0.0)
        batches = self.method.step(number)
        assert batches is not None
        for batch in batches.micro_batches:
            self.engine.backward(self.method.loss(self.engine.module, batch).total, batches.divisor)
        self.engine.step()

    def write(self, **settings: Any) -> list[Completion]:
        engine = InProcessEngine(self.engine.module, 0, [2], self.context, batch_size=4, **settings)
        return engine.generate(requests_for([[token % 280 for token in prompt] for prompt in PROMPTS]), DRAWN)

    def parameters(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.parameters()}


@pytest.fixture
def trained(small_world: SmallWorld, tmp_path: Path) -> Iterator[Any]:
    made: list[Trained] = []

    def make(changes: Mapping[str, Any]) -> Trained:
        made.append(Trained(small_world, tmp_path / str(len(made)), changes))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


@pytest.mark.parametrize(
    ("engine", "tuning"), [("zero0", {}), ("zero1", {}), ("zero2", LORA), ("zero3", {}), ("zero3", LORA)]
)
def test_every_engine_writes_what_the_plain_one_writes(engine: str, tuning: dict[str, Any], trained: Any) -> None:
    plain, other = trained(tuning), trained(ENGINES[engine] | tuning)
    for one in (plain, other):
        one.step(0)
    for found, wanted in zip(other.write(), plain.write(), strict=True):
        assert found.ids == wanted.ids
        assert found.log_probs == pytest.approx(wanted.log_probs, abs=1e-3)


@pytest.mark.parametrize("gather", [True, False], ids=["gathered once", "layer by layer"])
def test_split_parameters_write_in_either_way_and_training_goes_on_as_if_nothing_was_written(
    gather: bool, trained: Any
) -> None:
    silent = trained(ENGINES["zero3"])
    for number in range(3):
        silent.step(number)
    wanted = silent.parameters()
    silent.engine.close()  # one model that is split at a time
    writing = trained(ENGINES["zero3"])
    for number in range(3):
        writing.step(number)
        hooks = [list(part._forward_hooks) for part in writing.tuned.model.modules()]
        assert is_split(writing.engine.module)
        assert len(writing.write(gather=gather)) == len(PROMPTS)
        assert [list(part._forward_hooks) for part in writing.tuned.model.modules()] == hooks
        assert any(hooks)
        split = [p for p in writing.tuned.model.parameters() if not p.ds_persist]
        assert all(parameter.numel() == 0 for parameter in split), "split again"
    for name, tensor in writing.parameters().items():
        torch.testing.assert_close(tensor, wanted[name], atol=0, rtol=0)


def test_parameters_are_gathered_once_and_not_for_each_token(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    one = trained(ENGINES["zero3"])
    one.step(0)
    fetched = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        fetched.append(1)
        return fetch(self, *arguments, **named)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", counted)
    gathered = one.write(gather=True)
    assert fetched == []
    assert one.write(gather=False) == gathered
    assert fetched


def test_gathering_is_left_alone_where_memory_would_not_do(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trained(ENGINES["zero3"])
    one.step(0)
    needed = sum(parameter.ds_numel * 4 for parameter in one.tuned.model.parameters())
    for free, fits in ((needed, False), (2 * needed, True)):
        monkeypatch.setattr("finetune_trainers.rollout.zero3._free_bytes", lambda context, free=free: free)
        assert fits_whole(list(one.tuned.model.parameters()), one.context) is fits
        assert len(one.write()) == len(PROMPTS)


def test_a_part_that_does_not_write_is_not_gathered(trained: Any) -> None:
    one = trained(ENGINES["zero3"])  # not stepped: DeepSpeed keeps small parameters whole after a step
    wanted = one.write(gather=True)
    model = one.tuned.model
    with gathered(model, parameters_but(model, ["mlp"])):
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert {name for name, size in sizes.items() if size == 0} == {name for name in sizes if ".mlp." in name}
    assert one.write(gather=True, without=["critic"]) == wanted


@pytest.mark.parametrize("engine", ["torch", "zero2", "zero3"])
def test_half_precision_writes_with_the_weights_that_training_uses(engine: str, trained: Any) -> None:
    one = trained(ENGINES[engine] | {"training.precision": "bf16"})
    one.step(0)
    answers = one.write(autocast=torch.bfloat16 if engine == "torch" else None)
    assert answers == one.write()
    with torch.no_grad():
        ids = torch.tensor([[token % 280 for token in PROMPTS[4]]])
        logits = one.engine.module(input_ids=ids).logits[0, -1].float() / 0.9
    wanted = torch.log_softmax(logits, dim=-1)[answers[4].ids[0]].item()
    assert answers[4].log_probs[0] == pytest.approx(wanted, abs=0.05)
