"""A reward model: a score that is higher for the answer that people preferred.

    B  pairs of a micro-batch; its documents are chosen, rejected, chosen, rejected, ...

Only differences of scores are learned, so their place and spread are arbitrary. What they are on held-out rows is
measured (`Calibration`) and written into the artifact: whoever uses the scores can put them on a common footing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from finetune_api.base import Contract
from finetune_api.spec import Reward as RewardSettings
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch, StepBatches, TrainBatches
from finetune_trainers.methods import BatchLoss, Method
from finetune_trainers.methods.sequences import PAIR_SUMS, evaluate_sequences, pair_figures, pair_sums, pairs
from finetune_trainers.rl.preference_losses import reward_loss
from finetune_trainers.score_head import scores

__all__ = ["CALIBRATION_BATCHES", "Calibration", "Reward"]

CALIBRATION_BATCHES = 64
"""Of the training data, on each rank, where there is no evaluation data."""


class Calibration(Contract):
    """Where a reward model's scores lie: (score - mean) / scale is around 0 with a spread of 1."""

    mean: float
    scale: float
    """Standard deviation over chosen and rejected answers."""
    squash: bool
    """The calibrated score is to be put through the logistic function, which makes it 0 to 1."""
    measured_on: str
    """`eval` or `train`."""

    @classmethod
    def of(cls, figures: Mapping[str, float], squash: bool, measured_on: str) -> Calibration:
        """From the figures of an evaluation."""
        mean = (figures["eval_rewards/chosen"] + figures["eval_rewards/rejected"]) / 2
        scale = figures["eval_rewards/std"]
        return cls(mean=mean, scale=scale if scale > 0 else 1.0, squash=squash, measured_on=measured_on)


class Reward(Method):
    """The method as the loop sees it."""

    num_sums = PAIR_SUMS + 1

    def __init__(
        self,
        settings: RewardSettings,
        padding_id: int,
        batches: TrainBatches,
        eval_batches: Callable[[], Iterable[Batch]],
        train_sample: Callable[[], Iterable[Batch]],
        context: WorkerContext,
    ) -> None:
        """`train_sample`: training data in order, for a calibration without evaluation data."""
        self._settings = settings
        self._padding_id = padding_id
        self._batches = batches
        self._eval_batches = eval_batches
        self._train_sample = train_sample
        self._context = context

    def step(self, step: int) -> StepBatches:
        return self._batches.step(step)

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        chosen, rejected = pairs(scores(module, batch, self._padding_id), batch)
        margin = batch.marks if batch.slots else None
        losses = reward_loss(chosen, rejected, margin, center_coefficient=self._settings.center_coefficient)
        return BatchLoss(losses.sum(), torch.cat([pair_sums(chosen, rejected), _squares(chosen, rejected)]))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        chosen, rejected, _, count, squares = sums
        num_scores = max(2 * count, 1.0)
        mean = (chosen + rejected) / num_scores
        return pair_figures(sums) | {"rewards/std": math.sqrt(max(squares / num_scores - mean**2, 0.0))}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        return evaluate_sequences(self, module, self._eval_batches(), self._context)

    def calibrate(self, module: nn.Module, evaluated: Mapping[str, float] | None) -> Calibration:
        """From the figures of an evaluation; without one, of `module` on training data. Collective."""
        if evaluated is not None:
            return Calibration.of(evaluated, self._settings.squash, "eval")
        sample = islice(self._train_sample(), CALIBRATION_BATCHES)
        figures = evaluate_sequences(self, module, sample, self._context)
        return Calibration.of(figures, self._settings.squash, "train")


def _squares(chosen: Tensor, rejected: Tensor) -> Tensor:
    """float64 [1]"""
    return (chosen.double().square() + rejected.double().square()).sum().detach()[None]
