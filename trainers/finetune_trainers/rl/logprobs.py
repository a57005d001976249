"""Log-probabilities and entropy of chosen tokens, without a wide copy of all logits. Called by all methods that write.

    K  positions      V  words of the vocabulary

Logits [K, V] are the largest tensor of a step. These functions work on a few rows at a time, and what they leave of the
logits is their gradient: with z the logits divided by the temperature t, and y the chosen token,

    d log softmax(z)_y / d logit_j = ([j = y] - softmax(z)_j) / t

Arithmetic is float32, or float64 for float64 logits, and dividing is part of it: rounded to bfloat16, quotients would
move a log-probability by hundredths of a nat, and the ratio to what another engine says with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["TokenStats", "token_log_probs", "token_stats"]

CHUNK_ELEMENTS = 1 << 22
"""Logits taken to float32 at a time: 16 MB, which stays close to the core that works on them."""


class TokenStats(NamedTuple):
    """Of each position; float32 [K], nats."""

    log_probs: Tensor
    entropy: Tensor
    """-sum_v p(v) log p(v), without gradient."""


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label], float32 [K], of logits [K, V] of any float type and labels [K].

    When a gradient is wanted, `logits` is overwritten by it: nobody reads logits twice.
    """
    found: Tensor = _TokenLogProbs.apply(logits, labels, 1.0, None)  # type: ignore[no-untyped-call]
    return found


def token_stats(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> TokenStats:
    """The same of softmax(logits / temperature), and its entropy beside it."""
    entropy = torch.zeros(labels.shape, dtype=_wide(logits), device=logits.device)
    found: Tensor = _TokenLogProbs.apply(logits, labels, temperature, entropy)  # type: ignore[no-untyped-call]
    return TokenStats(found, entropy)


class _TokenLogProbs(torch.autograd.Function):
    """Row by row; the gradient is written over the logits in the forward pass. `entropy` is filled in where it is
    given."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float, entropy: Tensor | None) -> Tensor:
        wide = _wide(logits)
        result = torch.zeros(labels.shape, dtype=wide, device=logits.device)
        rows = max(1, CHUNK_ELEMENTS // max(logits.shape[-1], 1))
        for start in range(0, labels.numel(), rows):
            chunk = logits[start : start + rows]
            targets = labels[start : start + rows, None]
            scaled = chunk if temperature == 1.0 else chunk.to(wide) / temperature
            log_probs = torch.log_softmax(scaled, dim=-1, dtype=wide)
            del scaled
            result[start : start + rows] = log_probs.gather(1, targets)[:, 0]
            if entropy is not None:
                entropy[start : start + rows] = -(log_probs.exp() * log_probs).sum(-1)
            if ctx.needs_input_grad[0]:
                grad = log_probs.exp_().neg_()
                grad.scatter_add_(1, targets, grad.new_ones(targets.shape))
                chunk.copy_(grad if temperature == 1.0 else grad.div_(temperature))
        if ctx.needs_input_grad[0]:
            ctx.grad = logits.detach()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        grad: Tensor = ctx.grad
        del ctx.grad
        return grad.mul_(grad_outputs[0][:, None]), None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
