"""Losses of learning from what people prefer, without a rollout: DPO, KTO, ORPO, and the reward model's.

    B  pairs, or rows where they are not paired

Log-probabilities are of whole responses: [B], nats, summed over a response's tokens unless a function says otherwise.
Losses are [B]; their mean over the global batch is the loss of a step. Called by the methods of those names.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DpoKind", "PreferenceLoss", "dpo_loss", "kto_loss", "orpo_loss", "reward_loss"]

DpoKind = Literal["sigmoid", "hinge", "ipo"]


class PreferenceLoss(NamedTuple):
    """The loss, and the rewards that the policy gives by being what it is: beta · log(p / p_ref). [B] each."""

    losses: Tensor
    chosen_rewards: Tensor
    """Without gradient."""
    rejected_rewards: Tensor
    """Without gradient."""


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    kind: DpoKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Direct preference optimisation. With h = log(p / p_ref) of chosen less that of rejected, s the
    sigmoid and e = `label_smoothing`:

        sigmoid   -(1 - e) log s(beta h) - e log s(-beta h)   Rafailov et al., arXiv 2305.18290, eq. 7; with e > 0
                                                              "conservative" (Mitchell, 2023)
        hinge     max(0, 1 - beta h)                          Zhao et al. (SLiC), arXiv 2305.10425
        ipo       (h - 1 / (2 beta))²                         Azar et al., arXiv 2310.12036, eq. 17

    e is the share of pairs believed to be the wrong way round. For ipo give *means* over a response's tokens: its
    target is absolute, and sums would grow with length. ValueError: beta not positive; e outside [0, 0.5) or not 0
    where the kind knows no noise.
    """
    _require_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: {label_smoothing} is not from 0 to below 0.5")
    if label_smoothing and kind in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing: {label_smoothing} has no meaning for {kind}; leave it 0")
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    gap = chosen_ratio - rejected_ratio
    right: Tensor = -F.logsigmoid(beta * gap)
    wrong: Tensor = -F.logsigmoid(-beta * gap)
    match kind:
        case "sigmoid":
            losses = (1 - label_smoothing) * right + label_smoothing * wrong
        case "hinge":
            losses = torch.relu(1 - beta * gap)
        case "ipo":
            losses = (gap - 1 / (2 * beta)).square()
        case _:
            assert_never(kind)
    return PreferenceLoss(losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach())


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """[B]: weight · (1 - s(beta (h - z0))) for desirable rows, weight · (1 - s(beta (z0 - h))) for the others.

    Ethayarajh et al., arXiv 2402.01306, with s the sigmoid, h = log(p / p_ref) and z0 = `kl`, which is max(0, the
    mean of log(p / p_ref) over answers to *other* prompts); `desirable` [B] is bool.
    The weights balance data in which one kind is rarer. ValueError: beta is not positive.
    """
    _require_positive("beta", beta)
    distance = beta * (log_probs - ref_log_probs - kl)
    liked = desirable.bool()
    # Two plain numbers would make a float32 tensor, whatever the type of the log-probabilities.
    weights = torch.where(liked, distance.new_tensor(desirable_weight), distance.new_tensor(undesirable_weight))
    # 1 - s(x) = s(-x), which keeps its digits where s(x) is almost 1.
    return weights * torch.sigmoid(torch.where(liked, -distance, distance))


def orpo_loss(chosen: Tensor, rejected: Tensor, chosen_nll: Tensor, *, beta: float) -> Tensor:
    """[B]: the chosen response's own loss, less beta log s(log odds(chosen) - log odds(rejected)). No reference.

    Hong et al., arXiv 2403.07691, eqs. 4, 6 and 7, with odds = p / (1 - p). `chosen` and `rejected` are *means* over
    tokens, at most 0; `chosen_nll` [B] is the mean negative log-likelihood that supervised training would use (over the
    response, or prompt and response). ValueError: beta is not positive.
    """
    _require_positive("beta", beta)
    odds_ratio = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    gain: Tensor = F.logsigmoid(odds_ratio)
    return chosen_nll - beta * gain


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, center_coefficient: float = 0.0
) -> Tensor:
    """[B]: -log s(chosen - rejected - margin) + center_coefficient · (chosen + rejected)²; scores [B].

    Bradley-Terry, with the margin of Llama 2 (arXiv 2307.09288, eq. 2) where raters said how much better, and the
    centring of Eisenstein et al. (arXiv 2312.09244) so that scores do not drift: only differences are learned.
    """
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    losses: Tensor = -F.logsigmoid(gap)
    return losses + center_coefficient * (chosen + rejected).square() if center_coefficient else losses


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, by the branch that keeps its digits (Mächler, 2012).

    Each branch sees only what it is good for: the other's infinite slope would make the gradient NaN. So would its own
    at 0, which is what fp32 makes of an answer that is all but certain. That counts as -eps and has the slope of -eps;
    a clamp would have none, and such an answer would never be learned from again.
    """
    values = torch.where(values < 0, values, values - torch.finfo(values.dtype).eps)
    near = values > -math.log(2)
    close = torch.log(-torch.expm1(torch.where(near, values, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, values)))
    return torch.where(near, close, far)


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: {value} is not above 0")
