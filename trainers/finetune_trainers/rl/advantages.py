"""From rewards to advantages: how much better than expected each token, or each response, turned out.

    B  responses      T  positions      G  responses to one prompt, neighbours in the batch      P = B / G  prompts

Nothing here carries a gradient. Called by the loop of PPO (`gae`) and by those of GRPO, DAPO and RLOO (the groups).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

__all__ = ["Advantages", "Baseline", "gae", "group_advantages", "informative_groups", "mask_of_lengths"]

Baseline = Literal["grpo", "dr_grpo", "rloo"]


class Advantages(NamedTuple):
    """[B, T] each, 0 outside the mask."""

    advantages: Tensor
    returns: Tensor
    """Advantages plus values: what the critic should have said."""


def mask_of_lengths(lengths: Tensor, width: int) -> Tensor:
    """[B, width] bool that holds on the first lengths[b] positions of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), backwards over time:

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    rewards, values, mask [B, T]; V after the last token is 0: a response is judged by what is there of it, also one
    that was cut off. Positions outside `mask` are stepped over, wherever they stand: padding on either side, or what a
    tool said between two parts of a response, whose next token is then the next held one.
    """
    rewards, values, held = rewards.detach(), values.detach(), mask.bool()
    next_value = values.new_zeros(values.shape[0])
    carried = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for position in reversed(range(values.shape[1])):
        here, value = held[:, position], values[:, position]
        delta = rewards[:, position] + gamma * next_value - value
        carried = torch.where(here, delta + gamma * lam * carried, carried)
        next_value = torch.where(here, value, next_value)
        advantages[:, position] = torch.where(here, carried, 0.0)
    return Advantages(advantages, torch.where(held, advantages + values, 0.0))


def group_advantages(rewards: Tensor, group_size: int, baseline: Baseline, *, eps: float = 1e-4) -> Tensor:
    """Advantages [B] of responses over the others to the same prompt; rewards [B], G = `group_size` neighbours.

        grpo      (r - mean) / (std + eps)      Shao et al., arXiv 2402.03300, section 4.1.2; std with G - 1, as in TRL
        dr_grpo   r - mean                      Liu et al., arXiv 2503.20783: the division favours easy and hard prompts
        rloo      r - mean of the others        Ahmadian et al., arXiv 2402.14740; G / (G - 1) times dr_grpo's

    A reward that is NaN was not to be had: that response counts for nobody and gets 0. So does one left alone.
    ValueError: a batch that is no whole number of groups, or groups of one.
    """
    groups = _groups(rewards, group_size)
    scored = ~groups.isnan()
    count = scored.sum(1, keepdim=True)  # [P, 1]
    kept = torch.where(scored, groups, 0.0)
    deviation = torch.where(scored, groups - kept.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    others = (count - 1).clamp(min=1)
    match baseline:
        case "grpo":
            std = (deviation.square().sum(1, keepdim=True) / others).sqrt()
            found = deviation / (std + eps)
        case "dr_grpo":
            found = deviation
        case "rloo":
            found = deviation * count / others
        case _:
            assert_never(baseline)
    return found.reshape(-1)


def informative_groups(rewards: Tensor, group_size: int, *, tolerance: float = 1e-8) -> Tensor:
    """[P] bool: the groups whose rewards differ by more than `tolerance`. rewards [B]; NaN takes no part.

    DAPO's dynamic sampling (arXiv 2503.14476, eq. 11) keeps only these: where all are right, or all wrong, every
    advantage is 0 and the prompt teaches nothing. ValueError as for `group_advantages`.
    """
    groups = _groups(rewards, group_size)
    unscored = groups.isnan()
    highest = groups.masked_fill(unscored, -torch.inf).amax(1)
    lowest = groups.masked_fill(unscored, torch.inf).amin(1)
    return highest - lowest > tolerance


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """[P, G], without gradient."""
    if group_size < 2:
        raise ValueError(f"group_size: {group_size} is below 2, and one response has no others to be compared with")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards {list(rewards.shape)} are not whole groups of {group_size}")
    return rewards.detach().view(-1, group_size)
