"""From losses per token to the loss of a step, so that micro-batches and ranks add up to the global batch's.

    B  responses of a micro-batch      T  positions      mask [B, T] holds on the tokens that the policy chose

The divisor is always one of the whole global batch, known before its first micro-batch: the sum of what is returned
for every micro-batch on every rank is then the loss, however the batch was cut. Called by the loops of PPO and GRPO.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

from finetune_trainers.rl.statistics import masked_mean, masked_sum

__all__ = ["Aggregation", "aggregate", "divisor"]

Aggregation = Literal["token", "sequence", "constant"]
"""How tokens are weighed.

    token      all alike, so that long responses count for more (DAPO, arXiv 2503.14476, eq. 12)
    sequence   all responses alike: the mean of each, then theirs (GRPO, arXiv 2402.03300, eq. 3)
    constant   the sum over responses · the longest length allowed, which no response can change by its length
               (Dr. GRPO, arXiv 2503.20783)
"""


def divisor(mask: Tensor, aggregation: Aggregation, *, max_length: int | None = None) -> float:
    """What this part of a global batch adds to its divisor; sum it over micro-batches and ranks. mask [B, T].

    `max_length`, in tokens, is for "constant" alone. ValueError: it is missing there.
    """
    match aggregation:
        case "token":
            return float(mask.bool().sum())
        case "sequence":
            return float(mask.shape[0])
        case "constant":
            if max_length is None or max_length < 1:
                raise ValueError(f"max_length: {max_length} is no length, and 'constant' divides by it")
            return float(mask.shape[0] * max_length)
        case _:
            assert_never(aggregation)


def aggregate(losses: Tensor, mask: Tensor, aggregation: Aggregation, total: float) -> Tensor:
    """This part's share of the global loss; no dimensions. losses, mask [B, T]; `total` is the summed `divisor`.

    Sums are float32, or float64 for float64 losses. A response without a token adds nothing. ValueError: `total` is 0,
    that is, nowhere in the global batch is there anything to learn.
    """
    if not total > 0:
        raise ValueError(f"total: {total} is not above 0; no token of the global batch is trained on")
    wide = losses if losses.dtype == torch.float64 else losses.float()
    if aggregation == "sequence":
        return masked_mean(wide, mask, dim=1).sum() / total
    return masked_sum(wide, mask) / total
