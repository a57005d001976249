"""Small worlds of judged answers: a model, pairs and single answers to train and evaluate on, and runs in this process.

What differs between the methods is in one table, so that a test of all of them is one test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome
from tests.trainers.conftest import SmallWorld
from tests.trainers.factories import tiny_model, write_pairs, write_rated

__all__ = ["LORA", "METHODS", "JudgedWorld", "zero"]

METHODS: dict[str, dict[str, Any]] = {
    "reward": {"reward": {"maxSeqLength": 64}},
    "dpo": {"dpo": {"maxSeqLength": 64}},
    "ipo": {"dpo": {"maxSeqLength": 64, "lossType": "ipo"}},
    "hinge": {"dpo": {"maxSeqLength": 64, "lossType": "hinge"}},
    "smoothed dpo": {"dpo": {"maxSeqLength": 64, "labelSmoothing": 0.1}},
    "kto": {"kto": {"maxSeqLength": 64, "undesirableWeight": 1.5}},
    "orpo": {"orpo": {"maxSeqLength": 64}},
}
LORA: dict[str, Any] = {"tuning": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targetModules": ["all-linear"]}}}


def zero(stage: int) -> dict[str, Any]:
    """The DeepSpeed engine, also where one process would not need it."""
    return {"deepspeed": {"zeroStage": stage, "config": {"wall_clock_breakdown": False}}}


@dataclass(frozen=True)
class JudgedWorld:
    """One folder with everything in it."""

    world: SmallWorld

    @classmethod
    def at(cls, folder: Path, tied: bool = True) -> JudgedWorld:
        tiny_model(folder / "model", tied=tied)
        write_pairs(folder / "pairs.jsonl", 40)
        write_pairs(folder / "eval-pairs.jsonl", 10, seed=1)
        write_rated(folder / "rated.jsonl", 40)
        write_rated(folder / "eval-rated.jsonl", 10, seed=1)
        return cls(SmallWorld(folder))

    def plan(self, method: str, changes: dict[str, Any] | None = None, evaluated: bool = True) -> RunPlan:
        """Eight pairs a step; `changes` by dotted path below spec."""
        rows = "rated.jsonl" if method == "kto" else "pairs.jsonl"
        data: dict[str, Any] = {"train": [{"source": f"file://{self.world.folder / rows}"}]}
        if evaluated:
            data["eval"] = [{"source": f"file://{self.world.folder}/eval-{rows}"}]
        defaults = {"method": METHODS[method], "data": data, "training.globalBatchSize": 8}
        return self.world.plan(defaults | (changes or {}))

    def train(self, plan: RunPlan, workdir: Path) -> Outcome:
        outcome = self.world.train(plan, workdir)
        assert outcome.failure is None, outcome.failure
        return outcome

    @staticmethod
    def figures(workdir: Path) -> list[dict[str, float]]:
        """What was logged, in order."""
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["metrics"] for line in lines]

    @classmethod
    def curve(cls, workdir: Path, figure: str) -> list[float]:
        return [one[figure] for one in cls.figures(workdir) if figure in one]

    @staticmethod
    def artifact(workdir: Path) -> dict[str, Tensor]:
        files = (workdir / "artifact").glob("*.safetensors")
        return {key: tensor for file in files for key, tensor in load_file(file).items()}
