"""Supervised fine-tuning: the negative log-likelihood of the tokens that the data says to learn.

    K  trained positions of a micro-batch      V  words of the vocabulary

Only trained positions reach the output head, so the logits are [K, V]. They are the largest tensor of a step:
`sum_nll` therefore works on a few rows at a time and leaves the gradient in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import IGNORED, Batch, StepBatches, TrainBatches
from finetune_trainers.evaluation import evaluate
from finetune_trainers.methods import BatchLoss

__all__ = ["Sft", "sum_nll"]

CHUNK_ELEMENTS = 1 << 22
"""Logits taken to fp32 at a time: 16 MB, which stays close to the core that works on them."""


class Sft:
    """The method as the loop sees it."""

    num_sums = 0

    def __init__(
        self, batches: TrainBatches, eval_batches: Callable[[], Iterable[Batch]], context: WorkerContext
    ) -> None:
        self._batches = batches
        self._eval_batches = eval_batches
        self._context = context

    def step(self, step: int) -> StepBatches:
        return self._batches.step(step)

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        """Summed negative log-likelihood (nats) of the trained tokens of `batch`."""
        logits = module(input_ids=batch.input_ids, **forward_kwargs(batch)).logits[0]  # [K, V]
        total = sum_nll(logits, batch.labels[batch.labels != IGNORED])
        return BatchLoss(total, total.new_zeros(0, dtype=torch.float64))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        return {}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        return evaluate(module, self._eval_batches(), self._context)


def sum_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over K of -log softmax(logits)[label]. logits [K, V] of any float type, labels [K].

    Arithmetic is fp32. When a gradient is wanted, `logits` is overwritten by it: nobody reads logits twice.
    """
    loss: Tensor = _SumNll.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss


class _SumNll(torch.autograd.Function):
    """d/d logits = softmax(logits) - one_hot(label), row by row; written over the logits in the forward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = max(1, CHUNK_ELEMENTS // max(logits.shape[-1], 1))
        for start in range(0, labels.numel(), rows):
            chunk = logits[start : start + rows]
            targets = labels[start : start + rows, None]
            log_probs = torch.log_softmax(chunk, dim=-1, dtype=torch.float32)
            total -= log_probs.gather(1, targets).sum()
            if ctx.needs_input_grad[0]:
                grad = log_probs.exp_()
                grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
                chunk.copy_(grad)
        if ctx.needs_input_grad[0]:
            ctx.grad = logits.detach()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad: Tensor = ctx.grad
        del ctx.grad
        return grad.mul_(grad_outputs[0]), None
