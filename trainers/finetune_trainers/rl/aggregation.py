"""From losses per token to the loss of a step, so that micro-batches and ranks add up to the global batch's.

    loss of a step = sum over its tokens of weight · loss / divisor

Weights follow from a response's own length and the divisor from the whole global batch, so it does not matter how that
is cut. Called by GRPO; for PPO all tokens are alike.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor

__all__ = ["Aggregation", "counts_tokens", "token_weights"]

Aggregation = Literal["token", "sequence", "constant"]
"""How tokens are weighed.

    token      all alike, so that long responses count for more (DAPO, arXiv 2503.14476, eq. 12)
    sequence   all responses alike: the mean of each, then theirs (GRPO, arXiv 2402.03300, eq. 3)
    constant   the sum over responses · the longest length allowed, which no response can change by its length
               (Dr. GRPO, arXiv 2503.20783)
"""


def token_weights(lengths: Tensor, aggregation: Aggregation, *, max_length: int) -> Tensor:
    """float32 [B]: the weight of each token of responses of `lengths` [B] tokens, of which `max_length` are allowed."""
    match aggregation:
        case "token":
            return torch.ones(lengths.shape)
        case "sequence":
            return 1.0 / lengths.clamp(min=1)
        case "constant":
            return torch.full(lengths.shape, 1.0 / max_length)
        case _:
            assert_never(aggregation)


def counts_tokens(aggregation: Aggregation) -> bool:
    """Whether the divisor is the number of tokens of the global batch; otherwise it is that of its responses."""
    return aggregation == "token"
