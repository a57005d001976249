"""Supervised fine-tuning: the negative log-likelihood of the tokens that the data says to learn.

    K  trained positions of a micro-batch      V  words of the vocabulary

Only trained positions reach the output head, so the logits are [K, V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import IGNORED, Batch, StepBatches, TrainBatches
from finetune_trainers.evaluation import evaluate
from finetune_trainers.methods import BatchLoss, Method
from finetune_trainers.rl.logprobs import token_log_probs

__all__ = ["Sft", "sum_nll"]


class Sft(Method):
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

    Arithmetic is fp32. When a gradient is wanted, `logits` is overwritten by it.
    """
    return -token_log_probs(logits, labels).sum()
