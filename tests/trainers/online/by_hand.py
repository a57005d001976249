"""A method that is stepped by hand, and the same numbers from transformers' own models. For tests of formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.plan import RunPlan
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.batches import IGNORED, StepBatches
from finetune_trainers.engine import Engine
from finetune_trainers.methods import Method
from finetune_trainers.methods.building import build_method
from finetune_trainers.online.episodes import Experience
from finetune_trainers.worker import load
from tests.trainers.online.online_world import OnlineWorld

__all__ = ["ByHand", "Written", "log_probs_of", "plain_policy", "values_of", "written"]


@dataclass(frozen=True)
class Written:
    """A rollout as a batch has it."""

    prompt: list[int]
    answer: list[int]
    advantages: list[float]
    """What the batch says of each token."""


class ByHand:
    """One training, of which each step is asked for. It never evaluates, saves or logs."""

    def __init__(self, plan: RunPlan, online: OnlineWorld, workdir: Path) -> None:
        prepared = online.world.prepare(plan, workdir)
        context = SingleProcessContext(plan, workdir)
        torch.manual_seed(0)
        engine: Engine
        _, engine = load(plan, prepared, context)
        self.engine = engine
        self.method: Method = build_method(plan, prepared, self.engine.module, context)
        self.rate = prepared.learning_rate.peak
        self.tokenizer: Any = AutoTokenizer.from_pretrained(online.world.model)

    @classmethod
    @contextmanager
    def of(cls, plan: RunPlan, online: OnlineWorld, workdir: Path) -> Iterator[ByHand]:
        one = cls(plan, online, workdir)
        try:
            yield one
        finally:
            one.method.close()

    def backward(self, step: int) -> tuple[StepBatches, dict[str, float]]:
        """All of a step but the update -> its batches, and the method's figures."""
        assert self.rate is not None
        self.engine.begin_step(self.rate, 0.0)
        batches = self.method.step(step)
        assert batches is not None
        sums = torch.zeros(self.method.num_sums, dtype=torch.float64)
        for batch in batches.micro_batches:
            found = self.method.loss(self.engine.module, batch)
            self.engine.backward(found.total, batches.divisor)
            sums += found.sums
        return batches, self.method.figures(sums.tolist())

    def step(self, number: int) -> StepBatches:
        batches, _ = self.backward(number)
        self.engine.step()
        return batches

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.parameters()}

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def reward(self, written: Written) -> float:
        """What `many_letters` gives."""
        text = self.text(written.answer)
        return text.count("e") / max(len(text), 1)


def written(batches: StepBatches) -> list[Written]:
    """The rollouts of a step, in its order."""
    found = []
    for batch in batches.micro_batches:
        assert isinstance(batch, Experience)
        assert batch.advantages is not None
        seen = 0
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            ids, num = batch.input_ids[0, start:end].tolist(), int((batch.labels[0, start:end] != IGNORED).sum())
            found.append(Written(ids[:-num], ids[-num:], batch.advantages[seen : seen + num].tolist()))
            seen += num
    return found


def plain_policy(folder: Path, weights: dict[str, Tensor] | None = None) -> Any:
    """transformers' model, as it is on disk or with these weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if weights is not None:
        known = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in known.items():
                parameter.copy_(weights[name])
    return model


def log_probs_of(model: Any, one: Written) -> Tensor:
    """[n], of the answer's tokens."""
    ids = torch.tensor([one.prompt + one.answer])
    logits = model(input_ids=ids).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1)
    found: Tensor = logits.gather(1, torch.tensor(one.answer)[:, None])[:, 0]
    return found


def values_of(backbone: Any, head: Tensor, one: Written) -> Tensor:
    """[n], before each of the answer's tokens was chosen; `head` [1, H]."""
    hidden = backbone(input_ids=torch.tensor([one.prompt + one.answer])).last_hidden_state[0]
    found: Tensor = (hidden[len(one.prompt) - 1 : -1] @ head.T)[:, 0]
    return found
