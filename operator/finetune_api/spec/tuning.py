"""Which parameters learn."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import Choice, Contract, Rule, exactly_one
from finetune_api.spec.fields import Glob

__all__ = ["Freeze", "Full", "Lora", "Quantization", "Tuning", "UnfreezeStep"]


class Full(Contract):
    """Train every parameter."""


class Quantization(StrEnum):
    """How the frozen base is stored while adapters train."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


class Lora(Contract):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input; none in PPO and GRPO."""
    target_modules: Annotated[list[Glob], Field(min_length=1, max_length=64)] = Field(
        default_factory=lambda: ["q_proj", "v_proj"]
    )
    """Names of the linear layers that get an adapter. [all-linear] means all but the output head."""
    quantization: Quantization = Quantization.NONE
    """Store the frozen base in 8 bits (LLM.int8) or 4 bits (NF4). Needs bitsandbytes and zeroStage 0 to 2."""

    rules = (
        Rule(
            cel="!self.targetModules.exists(m, m == 'all-linear') || self.targetModules.size() == 1",
            message="all-linear stands alone; remove the other names or all-linear",
            holds=lambda lora: "all-linear" not in lora.target_modules or len(lora.target_modules) == 1,
            field="targetModules",
        ),
    )


class UnfreezeStep(Contract):
    """From one point of the training on, more layers learn."""

    at: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the training steps after which the layers start to learn."""
    layers: Annotated[list[Glob], Field(min_length=1, max_length=64)]
    """Patterns of parameter names that start to learn, such as model.layers.2?.*."""


class Freeze(Contract):
    """Train a part of the parameters, chosen by name; the rest stays as it is."""

    train: Annotated[list[Glob], Field(min_length=1, max_length=64)]
    """Patterns of the parameter names that learn from the first step, such as model.layers.2?.* or lm_head.*."""
    unfreeze: Annotated[list[UnfreezeStep], Field(max_length=16)] = Field(default_factory=list)
    """Progressive unfreezing: groups of layers that start to learn later, in the order of `at`."""

    rules = (
        Rule(
            cel="self.unfreeze.size() < 2 || self.unfreeze.all(a, self.unfreeze.exists_one(b, b.at == a.at))",
            message="two steps of unfreeze have the same `at`; join them",
            holds=lambda f: len({step.at for step in f.unfreeze}) == len(f.unfreeze),
            field="unfreeze",
        ),
    )


class Tuning(Choice):
    """Which parameters learn: exactly one."""

    full: Full | None = None
    """All of them."""
    lora: Lora | None = None
    """Low-rank adapters."""
    freeze: Freeze | None = None
    """Those whose names match."""

    rules = (exactly_one("full", "lora", "freeze"),)
