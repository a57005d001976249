"""What a causal model says of whole answers: log-probabilities of trained tokens, and their sums by document.

    K  trained positions of a micro-batch      D  documents of it      V  words of the vocabulary

Called by all methods that write. Only trained positions reach the output head. Their logits [K, V] are the
largest tensor of a step: `token_log_probs` works on a few rows at a time and leaves the gradient in their place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.data.batches import IGNORED, Batch

__all__ = ["Answers", "TokenStats", "answers", "document_of", "token_log_probs", "token_stats"]

CHUNK_ELEMENTS = 1 << 22
"""Logits taken to fp32 at a time: 16 MB, which stays close to the core that works on them."""


class Answers(NamedTuple):
    """Of each document of a batch."""

    log_probs: Tensor
    """fp32 [D], nats: the sum over its trained tokens."""
    num_tokens: Tensor
    """fp32 [D]; its trained tokens, at least 1."""

    @property
    def means(self) -> Tensor:
        """fp32 [D], nats a token."""
        return self.log_probs / self.num_tokens


def answers(module: nn.Module, batch: Batch) -> Answers:
    """One forward pass over `batch`."""
    logits = module(input_ids=batch.input_ids, **forward_kwargs(batch)).logits[0]  # [K, V]
    found = token_log_probs(logits, batch.labels[batch.labels != IGNORED])  # [K]
    owners = document_of(batch)  # [K]
    empty = found.new_zeros(len(batch.cu_seqlens) - 1)  # [D]
    counts = empty.index_add(0, owners, torch.ones_like(found))
    return Answers(empty.index_add(0, owners, found), counts.clamp(min=1))


def document_of(batch: Batch) -> Tensor:
    """int64 [K]: the document of each trained position."""
    positions = (batch.labels[0] != IGNORED).nonzero().squeeze(1)
    return torch.searchsorted(batch.cu_seqlens[1:].long(), positions, right=True)


class TokenStats(NamedTuple):
    """Of each trained position."""

    log_probs: Tensor
    """fp32 [K], nats."""
    entropy: Tensor
    """fp32 [K], nats, without gradient."""


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label], fp32 [K], of logits [K, V] of any float type and labels [K].

    When a gradient is wanted, `logits` is overwritten by it: nobody reads logits twice.
    """
    found: Tensor = _TokenLogProbs.apply(logits, labels, 1.0, None)  # type: ignore[no-untyped-call]
    return found


def token_stats(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> TokenStats:
    """The same of softmax(logits / temperature), and its entropy beside it."""
    entropy = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
    found: Tensor = _TokenLogProbs.apply(logits, labels, temperature, entropy)  # type: ignore[no-untyped-call]
    return TokenStats(found, entropy)


class _TokenLogProbs(torch.autograd.Function):
    """d/d logits = (one_hot(label) - softmax(logits / t)) / t, row by row; written over the logits in the forward pass.
    `entropy` is filled in where it is given."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float, entropy: Tensor | None) -> Tensor:
        result = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
        rows = max(1, CHUNK_ELEMENTS // max(logits.shape[-1], 1))
        for start in range(0, labels.numel(), rows):
            chunk = logits[start : start + rows]
            targets = labels[start : start + rows, None]
            scaled = chunk if temperature == 1.0 else chunk / temperature
            log_probs = torch.log_softmax(scaled, dim=-1, dtype=torch.float32)
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
