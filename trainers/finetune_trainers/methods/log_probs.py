"""What a causal model says of whole answers: sums of log-probabilities of trained tokens, by document.

    K  trained positions of a micro-batch      D  documents of it      V  words of the vocabulary

Called by the methods that learn from judged answers. Only trained positions reach the output head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.rl.logprobs import token_log_probs

__all__ = ["Answers", "answers", "document_of"]


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
