"""Learning from pairs of answers without a reward model: DPO (with IPO and hinge) and ORPO.

    B  pairs of a micro-batch; its documents are chosen, rejected, chosen, rejected, ...

Both answers of a pair lie in one packed row, so one forward pass serves both. The loss is the mean over the pairs of
the global batch: neither a long answer nor a micro-batch with few pairs weighs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from finetune_api.spec import Dpo as DpoSettings
from finetune_api.spec import Orpo as OrpoSettings
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch, StepBatches, TrainBatches
from finetune_trainers.methods import BatchLoss, Method
from finetune_trainers.methods.log_probs import answers
from finetune_trainers.methods.references import References
from finetune_trainers.methods.sequences import PAIR_SUMS, evaluate_sequences, pair_figures, pair_sums, pairs
from finetune_trainers.rl.preference_losses import dpo_loss, orpo_loss

__all__ = ["Dpo", "Orpo"]


class Dpo(Method):
    """Direct preference optimisation: raise the odds of chosen over rejected answers beyond the reference's."""

    num_sums = PAIR_SUMS + 2

    def __init__(
        self,
        settings: DpoSettings,
        batches: TrainBatches,
        eval_batches: Callable[[], Iterable[Batch]],
        references: References,
        eval_references: References,
        context: WorkerContext,
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._eval_batches = eval_batches
        self._references = references
        self._eval_references = eval_references
        self._context = context

    def step(self, step: int) -> StepBatches:
        found = self._batches.step(step)
        return replace(found, micro_batches=[self._references.attach(batch) for batch in found.micro_batches])

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        said = answers(module, batch)
        policy, reference = said.log_probs, _references_of(batch, said.log_probs)
        if self._settings.loss_type == "ipo":  # its target is absolute: sums would grow with length
            policy, reference = said.means, reference / said.num_tokens[: len(reference)]
        found = dpo_loss(
            *pairs(policy, batch),
            *pairs(reference, batch),
            beta=self._settings.beta,
            kind=self._settings.loss_type,
            label_smoothing=self._settings.label_smoothing,
        )
        sums = [pair_sums(found.chosen_rewards, found.rejected_rewards), _totals(*pairs(said.log_probs, batch))]
        return BatchLoss(found.losses.sum(), torch.cat(sums))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        chosen, rejected = (value / max(sums[PAIR_SUMS - 1], 1.0) for value in sums[PAIR_SUMS:])
        return pair_figures(sums) | {"logps/chosen": chosen, "logps/rejected": rejected}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        batches = (self._eval_references.attach(batch) for batch in self._eval_batches())
        return evaluate_sequences(self, module, batches, self._context)


class Orpo(Method):
    """Odds ratio preference optimisation: learn the chosen answer, and push its odds above the rejected one's."""

    num_sums = PAIR_SUMS + 3

    def __init__(
        self,
        settings: OrpoSettings,
        batches: TrainBatches,
        eval_batches: Callable[[], Iterable[Batch]],
        context: WorkerContext,
    ) -> None:
        self._beta = settings.beta
        self._batches = batches
        self._eval_batches = eval_batches
        self._context = context

    def step(self, step: int) -> StepBatches:
        return self._batches.step(step)

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        said = answers(module, batch)
        chosen, rejected = pairs(said.means, batch)
        losses = orpo_loss(chosen, rejected, -chosen, beta=self._beta)
        sums = [
            pair_sums(self._beta * chosen, self._beta * rejected),
            _totals(*pairs(said.log_probs, batch)),
            -chosen.detach().double().sum()[None],
        ]
        return BatchLoss(losses.sum(), torch.cat(sums))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        chosen, rejected, nll = (value / max(sums[PAIR_SUMS - 1], 1.0) for value in sums[PAIR_SUMS:])
        return pair_figures(sums) | {"logps/chosen": chosen, "logps/rejected": rejected, "nll_loss": nll}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        return evaluate_sequences(self, module, self._eval_batches(), self._context)


def _references_of(batch: Batch, like: Tensor) -> Tensor:
    """[2B] in the order of the documents; none of a batch without sequences."""
    return like.new_zeros(0) if batch.references is None else batch.references.flatten()


def _totals(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.stack([chosen.double().sum(), rejected.double().sum()]).detach()
