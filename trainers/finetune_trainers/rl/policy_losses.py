"""The policy's loss per token: PPO's clipped surrogate, with the bounds of dual clip and clip-higher.

    B  responses      T  positions      mask [B, T] holds on the tokens that the policy chose

Called by PPO and GRPO, which make one number of what is returned (`aggregation`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finetune_trainers.rl.statistics import masked_mean

__all__ = ["MAX_LOG_RATIO", "PolicyLoss", "log_prob_gap", "ppo_policy_loss", "truncated_importance"]

MAX_LOG_RATIO = 20.0
"""Nats. A token that became e^20 = 5e8 times as likely lies beyond every bound, and where none holds, one such token
would be the whole gradient; beyond it there is none. exp of more than 88 is infinite in float32, and the gradient NaN
even of a token that was clipped, or that has no advantage: 0 times infinity."""


class PolicyLoss(NamedTuple):
    """The loss, and what a run watches."""

    losses: Tensor
    """[B, T], to be made small; 0 outside the mask."""
    clipfrac: Tensor
    """Share of the tokens on which a bound decided, so that no gradient flowed; no dimensions."""
    approx_kl: Tensor
    """Mean of ratio - 1 - log ratio, nats per token: how far this policy is from the one that sampled."""


def ppo_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347, eq. 7), negated. With ratio w = p / p_old:

        loss = -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A)

    clip_high > clip_low leaves rare tokens room to grow (DAPO's clip-higher, arXiv 2503.14476, eq. 10). `dual_clip` c
    bounds the loss at -c A where A < 0, so that one token of an enormous ratio cannot ruin an update (Ye et al., arXiv
    1912.09729, eq. 5). No ratio is above e^`MAX_LOG_RATIO`. log_probs, old_log_probs [B, T]; advantages [B, T], or [B]
    where all tokens share one; weights [B, T] multiply the loss: those of `truncated_importance`. ValueError: bounds
    that leave no room, or cross.
    """
    _check_bounds(clip_low, clip_high, dual_clip)
    held = mask.bool()
    # Outside the mask anything may stand; a ratio of 1 there keeps it out of the gradient.
    log_ratio = torch.where(held, log_probs - old_log_probs, 0.0).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    shared = advantages[:, None] if advantages.ndim == 1 else advantages
    gain = torch.where(held, shared.detach(), 0.0)  # [B, T]
    free, bounded = -gain * ratio, -gain * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(free, bounded)
    cut = bounded > free
    if dual_clip is not None:
        ceiling = torch.where(gain < 0, -gain * dual_clip, torch.inf)
        cut = cut | (losses > ceiling)
        losses = torch.minimum(losses, ceiling)
    if weights is not None:
        losses = losses * torch.where(held, weights.detach(), 0.0)
    quiet = log_ratio.detach()
    return PolicyLoss(losses, masked_mean(cut.to(losses.dtype), held), masked_mean(torch.expm1(quiet) - quiet, held))


def truncated_importance(log_probs: Tensor, engine_log_probs: Tensor, mask: Tensor, *, cap: float = 2.0) -> Tensor:
    """min(p / p_engine, cap) [B, T], 0 outside `mask`: weights for tokens that another engine sampled.

    A rollout engine with kernels of its own samples from a slightly other policy than the trainer computes. `log_probs`
    are the trainer's at sampling time, before the update. Bounded importance weights are those of IMPALA (Espeholt et
    al., arXiv 1802.01561, section 4.1); Yao et al. (2025) use them for this. ValueError: `cap` below 1.
    """
    if not cap >= 1:
        raise ValueError(f"cap: {cap} is below 1, which would also shrink tokens on which both engines agree")
    log_ratio = torch.where(mask.bool(), (log_probs - engine_log_probs).detach(), -torch.inf)
    return log_ratio.exp().clamp(max=cap)


def log_prob_gap(log_probs: Tensor, engine_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean of |log p - log p_engine| over the tokens of `mask` [B, T]; nats, no dimensions: do the engines agree?"""
    return masked_mean((log_probs - engine_log_probs).detach().abs(), mask)


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low: {clip_low} is not between 0 and 1")
    if not clip_high > 0:
        raise ValueError(f"clip_high: {clip_high} is not above 0")
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        raise ValueError(f"dual_clip: {dual_clip} is not above 1 + clip_high, {1 + clip_high}")
