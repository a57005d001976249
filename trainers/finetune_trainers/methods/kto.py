"""Kahneman-Tversky optimisation: learning from single answers that somebody liked or did not.

A sequence of the data holds two documents: a prompt with its answer, and the same prompt with another row's answer. The
second kind never gets a gradient; it tells how far the policy has moved as a whole, the point from which gains and
losses are felt. That point is a mean over the *global* batch, so it is asked before the step's first micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from finetune_api.spec import Kto as KtoSettings
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch, StepBatches, TrainBatches
from finetune_trainers.evaluation import evaluating
from finetune_trainers.methods import BatchLoss, Method
from finetune_trainers.methods.log_probs import answers
from finetune_trainers.methods.references import References
from finetune_trainers.methods.sequences import evaluate_sequences
from finetune_trainers.rl.preference_losses import kto_loss

__all__ = ["MATCHED", "MISMATCHED", "Kto"]

MATCHED, MISMATCHED = slice(0, 1), slice(1, 2)
"""Which of a sequence's documents: the answer to the prompt, the answer to another one."""


class Kto(Method):
    """The method as the loop sees it."""

    num_sums = 8

    def __init__(
        self,
        settings: KtoSettings,
        module: nn.Module,
        batches: Callable[[slice], TrainBatches],
        eval_batches: Callable[[slice], Iterable[Batch]],
        references: References,
        eval_references: References,
        context: WorkerContext,
    ) -> None:
        """`module` is what the loop passes to `loss`; batches are made of the documents that a slice names."""
        self._settings = settings
        self._module = module
        self._matched, self._mismatched = batches(MATCHED), batches(MISMATCHED)
        self._eval_batches = eval_batches
        self._references = references
        self._eval_references = eval_references
        self._context = context
        self._kl = torch.zeros((), device=context.device)

    def step(self, step: int) -> StepBatches:
        matched = self._matched.step(step)
        mismatched = (self._references.attach(batch) for batch in self._mismatched.step(step).micro_batches)
        self._kl = self._measure_kl(self._module, mismatched)
        return replace(matched, micro_batches=[self._references.attach(batch) for batch in matched.micro_batches])

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        settings = self._settings
        count = len(batch.slots)
        found = answers(module, batch).log_probs[:count]
        reference, liked = found.new_zeros(0), found.new_zeros(0)
        if batch.references is not None and batch.marks is not None:
            reference, liked = batch.references[:, 0], batch.marks
        losses = kto_loss(
            found,
            reference,
            liked > 0.5,
            self._kl,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        return BatchLoss(losses.sum(), self._sums(found.detach(), reference, liked > 0.5))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        kl, count, *rest = sums
        figures = {"kl": kl / max(count, 1.0)}
        for name, (reward, log_prob, number) in {"chosen": rest[:3], "rejected": rest[3:]}.items():
            if number:  # a batch may hold one kind only
                figures |= {f"rewards/{name}": reward / number, f"logps/{name}": log_prob / number}
        if {"rewards/chosen", "rewards/rejected"} <= figures.keys():
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        return figures

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        before = self._kl
        self._kl = self._measure_kl(module, map(self._eval_references.attach, self._eval_batches(MISMATCHED)))
        batches = map(self._eval_references.attach, self._eval_batches(MATCHED))
        figures = evaluate_sequences(self, module, batches, self._context)
        self._kl = before
        return figures

    def _measure_kl(self, module: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """max(0, mean log(p / p_ref)) over the mismatched answers of all ranks; no dimensions. Collective."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._context.device)
        with evaluating(module), torch.no_grad():
            for batch in batches:
                moved = batch.to(self._context.device)
                found = answers(module, moved).log_probs[: len(batch.slots)]
                if moved.references is not None:
                    totals[0] += (found - moved.references[:, 1]).sum()
                totals[1] += len(batch.slots)
        totals = self._context.all_reduce_sum(totals)
        return (totals[0] / totals[1].clamp(min=1)).clamp(min=0).float()

    def _sums(self, found: Tensor, reference: Tensor, liked: Tensor) -> Tensor:
        """float64 [num_sums]: KL and rows, then reward, log-probability and number of liked rows, and of the others."""
        rewards = self._settings.beta * (found - reference)
        sums = [self._kl * len(found), torch.full_like(self._kl, float(len(found)))]
        for held in (liked, ~liked):
            sums += [rewards[held].sum(), found[held].sum(), held.sum()]
        return torch.stack([value.double() for value in sums])
