"""The critic's loss per token, and how much of the returns it explains. Called by the loop of PPO.

B  responses      T  positions      mask [B, T] holds on the tokens that the policy chose
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finetune_trainers.rl.statistics import masked_mean, masked_var

__all__ = ["ValueLoss", "explained_variance", "value_loss"]


class ValueLoss(NamedTuple):
    """The loss, and what a run watches."""

    losses: Tensor
    """[B, T], to be made small; 0 outside the mask."""
    clipfrac: Tensor
    """Share of the tokens on which the bound decided; no dimensions."""


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None) -> ValueLoss:
    """½ max((V - R)², (clip(V, V_old - clip, V_old + clip) - R)²), or ½ (V - R)² where `clip` is None; [B, T] each.

    PPO's bound for the critic, from OpenAI's baselines; Engstrom et al. (arXiv 2005.12729, section 3) and Andrychowicz
    et al. (arXiv 2006.05990) describe it, and find that it can be left out. ValueError: `clip` is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: {clip} is not above 0")
    held = mask.bool()
    returns, old_values = returns.detach(), old_values.detach()
    # Masked before it is squared: a NaN in the padding would come back through the gradient of the square.
    free = torch.where(held, values - returns, 0.0).square()
    if clip is None:
        return ValueLoss(free / 2, free.new_zeros(()))
    near = values.clamp(
        old_values - clip, old_values + clip
    )  # exactly itself within them: no bound decides on rounding
    bounded = torch.where(held, near - returns, 0.0).square()
    return ValueLoss(torch.maximum(free, bounded) / 2, masked_mean((bounded > free).to(free.dtype), held))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the tokens of `mask` [B, T]: 1 is a perfect critic, 0 one that says nothing.

    NaN where all returns are equal, or there is one only: there is nothing to explain.
    """
    values, returns = values.detach(), returns.detach()
    if int(mask.bool().sum()) < 2:
        return values.new_tensor(torch.nan)
    spread = masked_var(returns, mask)
    unexplained = masked_var(returns - values, mask)
    return torch.where(spread > 0, 1 - unexplained / spread, torch.nan)
