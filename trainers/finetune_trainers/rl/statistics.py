"""Means, variances and whitening of what a mask lets count, and moments that add up over iterations.

    values, mask  [...] of one shape; a mask is bool, or 0 and 1

What the mask leaves out is never read: not even a NaN there reaches a result. Called by `rewards`, the losses, and PPO,
of which each rank knows all rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "masked_mean", "masked_sum", "masked_var", "merge", "moments_of", "whiten"]


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` where `mask` holds, over everything or over `dim`."""
    kept = torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` holds; 0 where it holds nowhere."""
    held = mask.bool()
    count = held.sum() if dim is None else held.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    """Variance over everything that `mask` lets count; `unbiased` divides by n - 1.

    ValueError: fewer values than that needs.
    """
    count = int(mask.bool().sum())
    if count < 1 + unbiased:
        raise ValueError(f"the variance of {count} values is not defined")
    deviation = torch.where(mask.bool(), values - masked_mean(values, mask), 0.0)
    return deviation.square().sum() / (count - unbiased)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations: plain numbers, which ranks can exchange and checkpoints keep."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def var(self, *, unbiased: bool = True) -> float:
        """Variance. ValueError: fewer values than that needs."""
        if self.count < 1 + unbiased:
            raise ValueError(f"the variance of {self.count:g} values is not defined")
        return self.squares / (self.count - unbiased)

    def state(self) -> dict[str, float]:
        """For a checkpoint; `Moments(**state)` is the way back."""
        return asdict(self)


def moments_of(values: Tensor, mask: Tensor | None = None) -> Moments:
    """The moments of `values` [...] where `mask` holds (everywhere when left out), taken in float64."""
    kept = values.detach() if mask is None else values.detach()[mask.bool()]
    if kept.numel() == 0:
        return Moments()
    wide = kept.double()
    mean = wide.mean()
    return Moments(float(wide.numel()), float(mean), float((wide - mean).square().sum()))


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all values behind `parts`, as if they had been taken at once.

    Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances":
    squares = squares_a + squares_b + (mean_b - mean_a)² n_a n_b / n. Unlike sums of squares it does not cancel.
    """
    whole = Moments()
    for part in parts:
        count = whole.count + part.count
        if part.count == 0:
            continue
        gap = part.mean - whole.mean
        whole = Moments(
            count,
            whole.mean + gap * part.count / count,
            whole.squares + part.squares + gap * gap * whole.count * part.count / count,
        )
    return whole


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(var + eps) where `mask` holds, 0 elsewhere; [...] as given.

    The variance is the unbiased one, as TRL takes it. A value that is the only one has none, and stays as it is.
    """
    found = moments_of(values, mask)
    white = (values - found.mean) / math.sqrt(found.var() + eps) if found.count > 1 else values
    return torch.where(mask.bool(), white, torch.zeros_like(white))
