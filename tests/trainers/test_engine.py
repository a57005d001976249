"""What an engine promises beyond equal steps: nothing is updated by a broken gradient, what is frozen stays frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune_trainers.context import SingleProcessContext
from finetune_trainers.engine import Engine
from finetune_trainers.errors import NonFiniteLossError
from finetune_trainers.methods.building import build_method
from finetune_trainers.methods.sft import sum_nll
from finetune_trainers.worker import load
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    **{
        f"zero{stage}": {"deepspeed": {"zeroStage": stage, "config": {"wall_clock_breakdown": False}}}
        for stage in range(4)
    },
}
FIRST, SECOND = "model.layers.0.*", "model.layers.1.*"


class Trained:
    """An engine that is stepped by hand."""

    def __init__(self, world: SmallWorld, workdir: Path, changes: Mapping[str, Any]) -> None:
        self.plan = world.plan({"training.maxSteps": 6} | dict(changes))
        prepared = world.prepare(self.plan, workdir)
        context = SingleProcessContext(self.plan, workdir)
        self.tuned, self.engine = load(self.plan, prepared, context)
        self.method = build_method(self.plan, prepared, self.engine.module, context)

    def step(self, number: int, done: float = 0.0, rate: float = 0.01, poison: float = 1.0) -> float | None:
        """Optimizer step `number`; the gradient of its last micro-batch is multiplied by `poison`."""
        engine: Engine = self.engine
        engine.begin_step(rate, done)
        batches = self.method.step(number)
        assert batches is not None
        for place, batch in enumerate(batches.micro_batches, start=1):
            loss = self.method.loss(engine.module, batch).total
            if place == len(batches.micro_batches):
                loss.register_hook(lambda grad: grad * poison)  # type: ignore[no-untyped-call]
            engine.backward(loss, batches.divisor)
        return engine.step()

    def parameters(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.parameters()}


@pytest.fixture
def trained(small_world: SmallWorld, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    made: list[Trained] = []

    def make(changes: Mapping[str, Any]) -> Trained:
        made.append(Trained(small_world, tmp_path / str(len(made)), changes))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_broken_gradient_is_refused_and_changes_no_parameter(
    engine: str, poison: float, precision: str, trained: Any
) -> None:
    one = trained(ENGINES[engine] | {"training.precision": precision, "training.microBatchSize": 2})
    assert one.step(0) is not None
    before = one.parameters()
    with pytest.raises(NonFiniteLossError):
        one.step(1, poison=poison)
    assert changed(before, one.parameters()) == set()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_changes_all_that_learns_and_nothing_that_is_frozen(engine: str, trained: Any) -> None:
    one = trained(ENGINES[engine] | {"tuning": {"freeze": {"train": [SECOND]}}})
    before = one.parameters()
    for number in range(3):
        one.step(number)
    assert changed(before, one.parameters()) == set(one.tuned.trainable)
    assert all(name.startswith("model.layers.1.") for name in one.tuned.trainable)


UNFREEZE = {"tuning": {"freeze": {"train": [SECOND], "unfreeze": [{"at": 0.5, "layers": [FIRST]}]}}}
DECAY = {"training.optimizer": {"weightDecay": 0.1}}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_group_stays_as_it_is_until_it_opens(engine: str, trained: Any) -> None:
    one = trained(ENGINES[engine] | UNFREEZE | DECAY)
    before = one.parameters()
    one.step(0, done=0.0)
    one.step(1, done=0.49)
    assert {name.split(".")[2] for name in changed(before, one.parameters())} == {"1"}
    middle = one.parameters()
    one.step(2, done=0.5)
    assert {name.split(".")[2] for name in changed(middle, one.parameters())} == {"0", "1"}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "torch"])
def test_unfreezing_makes_the_same_steps_in_every_engine(engine: str, trained: Any) -> None:
    """The moments of a group begin when it opens, and its closed gradient is in no norm."""
    one, other = trained(UNFREEZE | DECAY), trained(ENGINES[engine] | UNFREEZE | DECAY)
    for number in range(6):
        done = number / 6
        assert other.step(number, done) == pytest.approx(one.step(number, done), abs=1e-4)
    wanted = one.parameters()
    for name, tensor in other.parameters().items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-4, rtol=0)


def test_the_loss_is_the_plain_cross_entropy_and_so_is_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainers.rl.logprobs.CHUNK_ELEMENTS", 3 * 11)  # rows in three chunks
    logits = torch.randn(7, 11, dtype=torch.float64).float().requires_grad_()
    labels = torch.randint(0, 11, (7,))
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (wanted_gradient,) = torch.autograd.grad(wanted * 0.5, logits)
    given = logits.detach().clone().requires_grad_()
    loss = sum_nll(given * 1.0, labels)
    (gradient,) = torch.autograd.grad(loss * 0.5, given)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)


def test_the_loss_without_gradient_leaves_the_logits_alone() -> None:
    logits = torch.randn(4, 5)
    before = logits.clone()
    with torch.no_grad():
        sum_nll(logits, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(logits, before)


def test_no_trained_token_is_no_loss_and_still_has_a_gradient() -> None:
    weight = torch.ones(3, 5, requires_grad=True)
    loss = sum_nll(torch.empty(0, 3) @ weight, torch.empty(0, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert weight.grad is not None
    assert not weight.grad.any()
