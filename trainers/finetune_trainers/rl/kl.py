"""The distance between policy and reference: estimators from samples, and controllers of what that distance costs.

PPO takes k1 for the price of each token, and asks a controller once an iteration; GRPO has k3 in its loss. k2 is for
whoever compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from finetune_trainers.rl.policy_losses import MAX_LOG_RATIO

__all__ = ["AdaptiveKl", "FixedKl", "KlController", "KlEstimator", "controller_from_state", "kl_estimate"]

KlEstimator = Literal["k1", "k2", "k3"]
MAX_ERROR = 0.2
"""How much of an error Ziegler's controller acts upon in one update."""


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: KlEstimator) -> Tensor:
    """KL(policy || reference) from tokens that the policy sampled; nats, per token, shape [...] as given.

    With r = log p_ref - log p (Schulman, "Approximating KL divergence", 2020):

        k1 = -r             unbiased, of large variance, of either sign; its gradient as a loss says nothing, so it
                            belongs in the reward
        k2 = r² / 2         biased, never negative
        k3 = exp(r) - 1 - r unbiased and never negative; the penalty in GRPO's loss (arXiv 2402.03300, eq. 4); from
                            r = `MAX_LOG_RATIO` on it stays what it is there, or exp would overflow
    """
    log_ratio = ref_log_probs - log_probs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            # expm1 keeps the digits that exp(r) - 1 loses where the two policies are still close.
            bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
            return torch.expm1(bounded) - bounded
        case _:
            assert_never(estimator)


@dataclass(frozen=True)
class FixedKl:
    """A price that stays."""

    coefficient: float

    def __post_init__(self) -> None:
        _require(self.coefficient >= 0, "coefficient", self.coefficient, "0 or more")

    def updated(self, kl: float, num_episodes: int) -> FixedKl:
        """Itself. ValueError: `kl` is not finite."""
        _require(math.isfinite(kl), "kl", kl, "finite")
        return self

    def state(self) -> dict[str, float | str]:
        return {"kind": "fixed", **asdict(self)}


@dataclass(frozen=True)
class AdaptiveKl:
    """A price that rises while the policy strays farther than `target`, in nats per response, and falls while nearer.

    Ziegler et al., "Fine-tuning language models from human preferences", arXiv 1909.08593, as their code
    has it: after n episodes with mean distance kl,

        error = clip(kl / target - 1, -0.2, 0.2)        coefficient *= 1 + error min(n / horizon, 1)

    `horizon` is in episodes: about so many it takes to multiply the price by e^0.2. Theirs has no minimum: one
    measurement, however many episodes it is of, says no more than that the price should rise or fall by a fifth.
    """

    coefficient: float
    target: float
    horizon: int = 10_000

    def __post_init__(self) -> None:
        _require(self.coefficient > 0, "coefficient", self.coefficient, "above 0, or it could never rise")
        _require(self.target > 0, "target", self.target, "above 0")
        _require(self.horizon > 0, "horizon", self.horizon, "above 0")

    def updated(self, kl: float, num_episodes: int) -> AdaptiveKl:
        """The controller after `num_episodes` more, whose mean distance per response was `kl`.

        ValueError: `kl` is not finite.
        """
        _require(math.isfinite(kl), "kl", kl, "finite")
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        return replace(self, coefficient=self.coefficient * (1 + error * min(num_episodes / self.horizon, 1.0)))

    def state(self) -> dict[str, float | str]:
        return {"kind": "adaptive", **asdict(self)}


KlController = FixedKl | AdaptiveKl


def controller_from_state(state: Mapping[str, Any]) -> KlController:
    """What `state()` gave to a checkpoint. ValueError: a kind that is not known."""
    settings = dict(state)
    kind = settings.pop("kind", None)
    if kind not in ("fixed", "adaptive"):
        raise ValueError(f"kind: {kind!r} is neither 'fixed' nor 'adaptive'")
    return FixedKl(**settings) if kind == "fixed" else AdaptiveKl(**settings)


def _require(holds: bool, name: str, value: float, right: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {value} is not {right}")
