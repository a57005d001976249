"""What it takes to learn from rollouts that another engine than the trainer wrote. Called by `method`; pure.

    n  tokens of an answer

The engine computes with the same weights and other kernels, so it drew from a slightly other policy. How far the two
are apart is measured at every token, and each token's loss is multiplied with the bounded ratio of their probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finetune_trainers.online.episodes import Rollout
from finetune_trainers.rl.policy_losses import log_prob_gap, truncated_importance

__all__ = ["GAP", "corrections"]

GAP = "rollout_gap"
"""The figure of the mean gap; with _max behind it, of the largest."""


def corrections(
    rollouts: Sequence[Rollout], log_probs: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], dict[str, float]]:
    """Weights, fp32 [n] for each of `rollouts`, and figures: the mean and the largest |log p - log p_engine|, in nats.
    `log_probs` are the trainer's. Rollouts that the policy itself wrote have no weights, and there are no figures."""
    if any(rollout.engine_log_probs is None for rollout in rollouts):
        return [None] * len(rollouts), {}
    said = [one for one in log_probs if one is not None]
    assert len(said) == len(rollouts), "the policy is asked whenever another engine writes"
    ours = torch.cat([torch.zeros(0), *said])[None]  # [1, tokens of all rollouts]
    theirs = torch.tensor([value for rollout in rollouts for value in rollout.engine_log_probs or ()])[None]
    mask = torch.ones_like(ours, dtype=torch.bool)
    gap = float(log_prob_gap(ours, theirs, mask))
    figures = {GAP: gap, f"{GAP}_max": float((ours - theirs).abs().max())}
    weights = truncated_importance(ours, theirs, mask)[0]
    return list(torch.split(weights, [len(rollout.ids) for rollout in rollouts])), figures
