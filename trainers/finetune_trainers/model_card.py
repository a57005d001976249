"""The README.md of an artifact: what the model is, what it was made of, and how it did. Called by `artifact`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune_api.plan import RunPlan
from finetune_api.progress import EvalSummary
from finetune_trainers.prepared import PreparedData, PreparedModel

__all__ = ["CardFacts", "model_card"]


@dataclass(frozen=True)
class CardFacts:
    """What only the run knows."""

    data: PreparedData
    steps: int
    epochs: float
    learning_rate: float
    eval: EvalSummary | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def model_card(plan: RunPlan, prepared: PreparedModel, facts: CardFacts) -> str:
    return f"# {plan.name}\n"
