"""From the score of a response to the reward of each of its tokens. Called by the loop between scoring and advantages.

B  responses      T  positions of a response      mask [B, T] holds on the response's tokens
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from finetune_trainers.rl.statistics import Moments, merge, moments_of

__all__ = ["clip_scores", "normalise_scores", "overlong_penalty", "penalise_missing_eos", "token_rewards"]


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """`scores` [B] held within -limit and limit. ValueError: `limit` is not positive."""
    if not limit > 0:
        raise ValueError(f"limit: {limit} is not above 0")
    return scores.clamp(-limit, limit)


def normalise_scores(scores: Tensor, seen: Moments) -> tuple[Tensor, Moments]:
    """`scores` [B] over the deviation of all scores so far, these included; and the moments after them.

    As in Zheng et al., "Secrets of RLHF", arXiv 2307.04964, but for the mean, which stays: a score keeps its sign.
    `seen` is what came before (a checkpoint keeps it). While the deviation is below a hundredth of the mean, or 1e-8,
    scores pass unchanged: they are as good as equal, and dividing would make them hundreds or millions.
    """
    after = merge([seen, moments_of(scores)])
    deviation = math.sqrt(after.var()) if after.count > 1 else 0.0
    return (scores if deviation <= max(0.01 * abs(after.mean), 1e-8) else scores / deviation), after


def penalise_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """`scores` [B] less `penalty` where `ended` [B] (bool) says that the response never came to an end token.

    As in TRL (`missing_eos_penalty`); lm-human-preferences gave such responses a fixed score instead.
    """
    return torch.where(ended.bool(), scores, scores - penalty)


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """What to add to the scores of responses of `lengths` [B] tokens: 0 down to -1 over the last `buffer` tokens.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to max_length - buffer, then
    (max_length - buffer - length) / buffer, and -1 beyond max_length. ValueError: a buffer that does not fit.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer: {buffer} is not from 1 to the longest response, {max_length}")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor, coefficient: float) -> Tensor:
    """[B, T]: -coefficient · kl on each token, and the score [B] on the last one as well; 0 outside `mask`.

    `kl` [B, T] is k1 of policy and reference (Ziegler et al., arXiv 1909.08593, taken token by token). A
    response without tokens gets nothing: no token could carry its score.
    """
    held = mask.bool()
    zero = torch.zeros((), dtype=kl.dtype, device=kl.device)
    positions = torch.arange(held.shape[1], device=held.device)
    last = torch.where(held, positions, -1).amax(1)  # [B], -1 where there is no token
    ends = positions == last[:, None]
    return torch.where(held, -coefficient * kl, zero) + torch.where(ends, scores[:, None].to(kl.dtype), zero)
