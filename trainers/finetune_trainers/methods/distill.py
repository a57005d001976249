"""Distillation: give each next token the probability that a teacher gives it.

    K  trained positions of a micro-batch      V, U  words of the student's and of the teacher's output head

Both models read the same packed row, the teacher first and without a gradient, and only trained positions reach either
head. The logits [K, V] and [K, U] are the largest tensors of a step and are kept in the models' own precision:
`token_losses` takes a few rows at a time to fp32, and leaves the gradient in the place of the student's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune_api.spec import Distill as DistillSettings
from finetune_trainers.attention import forward_kwargs
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import IGNORED, Batch, StepBatches, TrainBatches
from finetune_trainers.errors import DataError
from finetune_trainers.evaluation import LARGEST_LOSS, evaluating, finite_loss
from finetune_trainers.methods import BatchLoss, Method
from finetune_trainers.rl.distillation import divergence

__all__ = ["Distill", "token_losses"]

CHUNK_ELEMENTS = 1 << 22
"""Logits of either side taken to fp32 at a time: 16 MB."""
_FIGURES = ("kl", "cross_entropy", "token_agreement", "token_accuracy")
"""Means over trained tokens: KL(teacher || student) and the data's cross-entropy, in nats and at temperature 1; the
share of places where both models think the same token the likeliest; the share where the student thinks the data's."""


class Distill(Method):
    """The method as the loop sees it."""

    num_sums = len(_FIGURES) + 1

    def __init__(
        self,
        settings: DistillSettings,
        teacher: nn.Module,
        batches: TrainBatches,
        eval_batches: Callable[[], Iterable[Batch]],
        context: WorkerContext,
    ) -> None:
        """`teacher` is frozen, and on the context's device."""
        self._settings = settings
        self._teacher = teacher
        self._batches = batches
        self._eval_batches = eval_batches
        self._context = context

    def step(self, step: int) -> StepBatches:
        return self._batches.step(step)

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        kwargs = forward_kwargs(batch)
        labels = batch.labels[batch.labels != IGNORED]  # [K]
        with torch.no_grad():
            taught = self._teacher(input_ids=batch.input_ids, **kwargs).logits[0]  # [K, U]
        logits = module(input_ids=batch.input_ids, **kwargs).logits[0]  # [K, V]
        losses, sums = token_losses(logits, taught, labels, self._settings)
        return BatchLoss(losses.sum(), sums)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        *totals, count = sums
        return {name: total / max(count, 1.0) for name, total in zip(_FIGURES, totals, strict=True)}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """The loss and the figures over the evaluation data of all ranks, each trained token counting the same.

        Raises NonFiniteLossError, and DataError when there is nothing to measure, on all ranks alike.
        """
        totals = torch.zeros(1 + self.num_sums, dtype=torch.float64, device=self._context.device)
        with evaluating(module), torch.no_grad():
            for batch in self._eval_batches():
                found = self.loss(module, batch.to(self._context.device))
                totals[0] += found.total
                totals[1:] += found.sums
        total, *sums = self._context.all_reduce_sum(totals).tolist()
        count = sums[-1]
        if count == 0:
            raise DataError("no row of the evaluation data has a token inside the loss")
        figures = {"loss": finite_loss(total / count), **self.figures(sums), "tokens": count}
        figures["perplexity"] = math.exp(min(figures["cross_entropy"], LARGEST_LOSS))
        return {f"eval_{name}": value for name, value in figures.items()}


def token_losses(
    logits: Tensor, taught: Tensor, labels: Tensor, settings: DistillSettings, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Of each of K tokens (1 - alpha) × temperature² × divergence + alpha × cross-entropy: fp32 [K]; and float64 sums
    over the tokens of what `Distill.figures` tells, without a gradient.

    `logits` [K, V] are the student's, `taught` [K, U] the teacher's, of any float type; `labels` [K] are the data's.
    Models are compared in the words that both heads have: what is beyond the shorter head is padding. When a gradient
    is wanted, `logits` is overwritten by it: nobody reads logits twice.
    """
    rows = max(1, chunk_elements // max(logits.shape[-1], 1))
    losses, sums = _TokenLosses.apply(logits, taught, labels, settings, rows)  # type: ignore[no-untyped-call]
    return losses, sums


class _TokenLosses(torch.autograd.Function):
    """A few rows at a time: losses, figures, and the gradient while the rows are at hand."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, taught: Tensor, labels: Tensor, settings: DistillSettings, rows: int
    ) -> tuple[Tensor, Tensor]:
        wants_gradient: bool = ctx.needs_input_grad[0]
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
        sums = torch.zeros(Distill.num_sums, dtype=torch.float64, device=logits.device)
        pieces = (torch.split(tensor, rows) for tensor in (logits, taught, labels, losses))
        for student, teacher, targets, place in zip(*pieces, strict=True):
            leaf, wide = student.float().detach().requires_grad_(wants_gradient), teacher.float()
            with torch.set_grad_enabled(wants_gradient):
                distance = _distance(leaf, wide, settings)
                found = (1 - settings.alpha) * settings.temperature**2 * distance
                if settings.alpha > 0:
                    found = found + settings.alpha * F.cross_entropy(leaf, targets, reduction="none")
                total = found.sum()
            place.copy_(found.detach())
            kl = distance if _is_kl(settings) else _distance(leaf.detach(), wide)
            sums += _sums(leaf.detach(), wide, targets, kl.detach())
            if wants_gradient:
                student.copy_(torch.autograd.grad(total, leaf)[0])
        if wants_gradient:
            ctx.grad = logits.detach()
        ctx.mark_non_differentiable(sums)
        return losses, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad: Tensor = ctx.grad
        del ctx.grad
        return grad.mul_(grad_outputs[0][:, None]), None, None, None, None


def _distance(student: Tensor, teacher: Tensor, settings: DistillSettings | None = None) -> Tensor:
    """[rows] of logits [rows, V] and [rows, U]: as the settings measure it; without them KL(teacher || student)."""
    shared = min(student.shape[-1], teacher.shape[-1])
    beta, temperature = (0.0, 1.0) if settings is None else (settings.mixture, settings.temperature)
    return divergence(student[:, :shared], teacher[:, :shared], beta=beta, temperature=temperature)


def _is_kl(settings: DistillSettings) -> bool:
    """The distance that is learned is the one that is told."""
    return settings.mixture == 0 and settings.temperature == 1


def _sums(student: Tensor, teacher: Tensor, targets: Tensor, kl: Tensor) -> Tensor:
    """float64 [num_sums] of logits [rows, V] and [rows, U]: the figures' sums, and the number of tokens."""
    student_choice, teacher_choice = student.argmax(-1), teacher.argmax(-1)
    found = (
        kl.sum(),
        F.cross_entropy(student, targets, reduction="sum"),
        (student_choice == teacher_choice).sum(),
        (student_choice == targets).sum(),
        student.new_tensor(float(len(targets))),
    )
    return torch.stack([value.double() for value in found])
