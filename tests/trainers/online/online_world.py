"""Small worlds of prompts: a model, prompts to train and evaluate on, a reward, and runs in this process."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome
from tests.trainers.conftest import SmallWorld
from tests.trainers.factories import WORDS, tiny_model
from tests.trainers.judged_world import JudgedWorld

__all__ = ["COMMON", "LORA", "METHODS", "OnlineWorld", "write_prompts"]

SAMPLING = {"maxNewTokens": 12}
REWARDS = [{"function": {"call": "tests.trainers.online.scores:many_letters", "settings": {"letter": "e"}}}]
COMMON: dict[str, Any] = {"maxSeqLength": 64, "sampling": SAMPLING, "rewards": REWARDS}
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"grpo": COMMON | {"groupSize": 4}},
    "ppo": {"ppo": COMMON | {"passes": 2, "miniBatches": 2, "kl": {"coefficient": 0.02}}},
}
LORA: dict[str, Any] = {"tuning": {"lora": {"rank": 8, "alpha": 64, "targetModules": ["all-linear"]}}}


def write_prompts(path: Path, num_rows: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_rows):
            words = draw.choices(WORDS, k=draw.randint(2, 8))
            file.write(json.dumps({"prompt": " ".join(words), "answer": " ".join(reversed(words))}) + "\n")
    return path


def _outspoken(folder: Path) -> None:
    """Larger weights: new ones are so small that all words are alike, which adapters change little."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)


@dataclass(frozen=True)
class OnlineWorld:
    """One folder with everything in it."""

    world: SmallWorld

    @classmethod
    def at(cls, folder: Path, hidden_size: int = 64, intermediate_size: int = 96) -> OnlineWorld:
        _outspoken(tiny_model(folder / "model", hidden_size=hidden_size, intermediate_size=intermediate_size))
        write_prompts(folder / "prompts.jsonl", 40)
        write_prompts(folder / "eval-prompts.jsonl", 8, seed=1)
        return cls(SmallWorld(folder))

    def plan(self, method: str, changes: dict[str, Any] | None = None, evaluated: bool = True) -> RunPlan:
        """Sixteen rollouts a step; `changes` by dotted path below spec."""
        data: dict[str, Any] = {"train": [{"source": f"file://{self.world.folder}/prompts.jsonl"}]}
        if evaluated:
            data["eval"] = [{"source": f"file://{self.world.folder}/eval-prompts.jsonl"}]
        defaults = {
            "method": METHODS[method],
            "data": data,
            "training.globalBatchSize": 16,
            "training.microBatchSize": 8,
        }
        return self.world.plan(defaults | (changes or {}))

    def train(self, plan: RunPlan, workdir: Path) -> Outcome:
        outcome = self.world.train(plan, workdir)
        assert outcome.failure is None, outcome.failure
        return outcome

    curve = JudgedWorld.curve
    figures = staticmethod(JudgedWorld.figures)
    artifact = staticmethod(JudgedWorld.artifact)
