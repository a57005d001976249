"""A student and a teacher of one family, rows to learn from, and runs in this process. For tests of distillation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune_api.failures import Failure, FailureClass
from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome
from finetune_trainers.launch import check
from tests.trainers.conftest import SmallWorld
from tests.trainers.factories import tiny_model, write_rows

__all__ = ["LORA", "School", "artifact", "curve", "zero"]

LORA: dict[str, Any] = {"tuning": {"lora": {"rank": 4, "alpha": 8, "targetModules": ["all-linear"]}}}
STEPS: dict[str, Any] = {
    "training": {
        "maxSteps": 8,
        "globalBatchSize": 8,
        "learningRate": 0.003,
        "schedule": "linear",
        "warmupFraction": 0.2,
        "precision": "fp32",
        "seed": 7,
    }
}


def zero(stage: int) -> dict[str, Any]:
    """The DeepSpeed engine, also where one process would not need it."""
    return {"deepspeed": {"zeroStage": stage, "config": {"zero_optimization": {"reduce_bucket_size": 1_000_000}}}}


@dataclass(frozen=True)
class School:
    """A student, a teacher of the same family with a layer more, and rows."""

    world: SmallWorld

    @classmethod
    def at(cls, folder: Path) -> School:
        tiny_model(folder / "model")
        teacher = AutoModelForCausalLM.from_pretrained(tiny_model(folder / "teacher", layers=3, tied=False, seed=5))
        with torch.no_grad():  # new models think all tokens alike: this one has opinions
            for parameter in teacher.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
        teacher.save_pretrained(folder / "teacher")
        write_rows(folder / "rows.jsonl", 100)
        write_rows(folder / "eval.jsonl", 10, seed=1)
        return cls(SmallWorld(folder))

    @property
    def teacher(self) -> Path:
        return self.world.folder / "teacher"

    def plan(
        self,
        changes: dict[str, Any] | None = None,
        evaluated: bool = True,
        taught_by: Path | None = None,
        **distill: Any,
    ) -> RunPlan:
        """Eight packed sequences a step; `changes` by dotted path below spec, `distill` within the method's block."""
        method = {"maxSeqLength": 64, "teacher": {"source": f"file://{taught_by or self.teacher}"}, **distill}
        return self.world.plan(STEPS | {"method": {"distill": method}} | (changes or {}), evaluated=evaluated)

    def train(self, plan: RunPlan, workdir: Path) -> Outcome:
        outcome = self.world.train(plan, workdir)
        assert outcome.failure is None, outcome.failure
        return outcome

    def refusal(self, plan: RunPlan, workdir: Path) -> Failure:
        """Why `plan` is refused before any worker."""
        failure = check(plan, workdir, self.world.cache).failure
        assert failure is not None
        assert failure.failure_class is FailureClass.USER_ERROR
        return failure


def curve(workdir: Path, figure: str) -> list[float]:
    """The figure as it was logged, in order."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["metrics"] for line in lines]
    return [one[figure] for one in logged if figure in one]


def artifact(workdir: Path) -> dict[str, Tensor]:
    files = (workdir / "artifact").glob("*.safetensors")
    return {key: tensor for file in files for key, tensor in load_file(file).items()}
