"""What keeps the memory of PPO small, and that nothing that is learned depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.batches import Batch
from finetune_trainers.engine import Engine
from finetune_trainers.engine_torch import TorchEngine
from finetune_trainers.methods import Method
from finetune_trainers.methods.building import build_method
from finetune_trainers.online import memory
from finetune_trainers.online.critic import CRITIC_PARTS
from finetune_trainers.online.method import Online
from finetune_trainers.worker import load
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import LORA, OnlineWorld

pytestmark = WHEN_TRAINING


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("memory"))


def begun(plan: RunPlan, online: OnlineWorld, workdir: Path, done: float = 0.0) -> tuple[Method, Engine, Batch]:
    """A method, its engine and its first micro-batch; `done`: how much of the training is thought to be over."""
    prepared = online.world.prepare(plan, workdir)
    context = SingleProcessContext(plan, workdir)
    torch.manual_seed(0)
    _, engine = load(plan, prepared, context)
    method = build_method(plan, prepared, engine.module, context)
    engine.begin_step(0.0, done)
    batches = method.step(0)
    assert batches is not None
    return method, engine, batches.micro_batches[0]


def gradients(engine: Engine) -> dict[str, Tensor]:
    found = {name: one.grad.clone() for name, one in engine.module.named_parameters() if one.grad is not None}
    engine.module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_policy_and_critic_learn_one_after_the_other_what_they_learn_at_once(
    tuning: dict[str, Any], online: OnlineWorld, tmp_path: Path
) -> None:
    method, engine, batch = begun(online.plan("ppo", tuning, evaluated=False), online, tmp_path)
    whole = method.loss(engine.module, batch)
    engine.backward(whole.total, 7)
    at_once = gradients(engine)
    parts, learned = [], []
    for part in method.losses(engine.module, batch):
        engine.backward(part.total, 7)
        parts.append(part)
        learned.append(gradients(engine))
    method.close()
    of_policy, of_critic = learned
    assert not of_policy.keys() & of_critic.keys(), "each learns from its own part"
    both = of_policy | of_critic
    assert both.keys() == at_once.keys()
    assert all(torch.equal(both[name], value) for name, value in at_once.items())
    assert torch.equal(parts[0].sums + parts[1].sums, whole.sums)
    assert parts[0].total + parts[1].total == whole.total


def test_the_activations_of_one_part_alone_are_kept(online: OnlineWorld, tmp_path: Path) -> None:
    method, engine, batch = begun(online.plan("ppo", evaluated=False), online, tmp_path)

    def kept(compute: Any) -> int:
        """Bytes that are saved for backward passes at once."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            held = compute()
        del held
        return sum(sizes.values())

    at_once = kept(lambda: method.loss(engine.module, batch))
    parts = method.losses(engine.module, batch)
    assert max(kept(lambda: next(parts)), kept(lambda: next(parts))) < 0.6 * at_once
    method.close()


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_while_the_critic_warms_up_the_policy_does_not_change_by_a_bit(
    tuning: dict[str, Any], online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[set[str]] = []
    """By step: who was another one after it."""
    update = TorchEngine.step

    def noted(engine: TorchEngine) -> float | None:
        before = {name: tensor.clone() for name, tensor in engine.parameters()}
        norm = update(engine)
        others = {name for name, tensor in engine.parameters() if not torch.equal(tensor, before[name])}
        is_of_critic = {name: bool({*CRITIC_PARTS} & {*name.split(".")}) for name in others}
        changed.append({"critic" if of_critic else "policy" for of_critic in is_of_critic.values()})
        return norm

    monkeypatch.setattr(TorchEngine, "step", noted)
    changes = {"method.ppo.critic": {"warmupIterations": 1}, "training.maxSteps": 8} | tuning
    online.train(online.plan("ppo", changes, evaluated=False), tmp_path / "run")
    assert changed == [{"critic"}] * 4 + [{"policy", "critic"}] * 4


def test_the_reference_is_in_memory_only_while_it_is_asked(
    online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    judge = Online._judged

    def size(method: Any) -> int:
        return sum(parameter.nbytes for parameter in method._parts.models._reference.parameters())

    def judged(method: Any, rollouts: Any) -> Any:
        seen["before"] = size(method)
        with method._parts.models.reference_at_work():
            seen["inside"] = size(method)
        found = judge(method, rollouts)
        seen["after"] = size(method)
        return found

    monkeypatch.setattr(Online, "_judged", judged)
    online.train(online.plan("ppo", {"training.maxSteps": 4}, evaluated=False), tmp_path / "run")
    assert seen["before"] == seen["after"] == 0
    assert seen["inside"] > 100_000


def test_what_was_freed_is_given_back_where_the_c_library_can() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    if memory._malloc_trim() is None:
        pytest.skip("this C library keeps what was freed")
    blocks = [torch.ones(25_000) for _ in range(2000)]  # 200 MB in pieces too small for a mapping of their own
    between = blocks[1::50]
    del blocks
    before = resident()
    memory.give_back()
    assert resident() < before - 20_000
    del between
