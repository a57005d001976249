"""From logits to tokens: which one a number between 0 and 1 stands for. Pure, called by `in_process`.

    B  rows of a batch      V  words of the vocabulary

A row's token depends on its own logits and its own number, so an answer does not depend on what shares its batch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune_trainers.rollout import Sampling

__all__ = ["draw", "seed_of", "uniforms"]

LIKELIEST = 512
"""Of so many tokens top-p looks at first: sorting a whole vocabulary takes longer than a step of a small model."""


def seed_of(*place: int) -> int:
    """Of one answer, by the run's seed and where the answer stands: the same in whatever process it is written."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) drawn from `seed`; a larger count goes on where a smaller one ends.

    Philox, whose raw stream numpy promises to keep (NEP 19): a resumed training must draw the same answers.
    """
    raw = np.random.Philox(key=seed).random_raw(count)
    return np.asarray((raw >> 11) * 2.0**-53, dtype=np.float64)


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(int64 [B] tokens, fp64 [B] their log-probabilities) of logits [B, V] and numbers fp64 [B] in [0, 1).

    Logits that are not finite give some token of the vocabulary and a log-probability that is not finite.
    """
    scores = logits.float() * (1.0 / (sampling.temperature or 1.0))
    scores -= scores.max(dim=-1, keepdim=True).values
    weights = scores.exp()  # [B, V], the largest 1
    totals = weights.sum(dim=-1, dtype=torch.float64)
    greedy = sampling.temperature == 0
    tokens = scores.argmax(dim=-1) if greedy else _at(numbers, _allowed(weights, sampling))
    return tokens, scores.gather(1, tokens[:, None])[:, 0].double() - totals.log()


def _at(numbers: Tensor, weights: Tensor) -> Tensor:
    """int64 [B]: where in the row's `weights` [B, V], laid end to end, the fraction `numbers` [B] of the way is."""
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    # rounding could lift a fraction just below 1 to the total, behind the last token that has any weight
    aims = torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, aims, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


def _allowed(weights: Tensor, sampling: Sampling) -> Tensor:
    """`weights` [B, V] with 0 for what top-k, and then top-p, leave out. Tokens as likely as the last one that stays
    stay too: half precision makes many alike, and which of them came first would be chance."""
    if 0 < sampling.top_k < weights.shape[-1]:
        last = weights.topk(sampling.top_k, dim=-1).values[:, -1:]
        weights = weights.where(weights >= last, 0.0)
    if sampling.top_p < 1.0:
        weights = weights.where(weights >= _last_of_nucleus(weights, sampling.top_p), 0.0)
    return weights


def _last_of_nucleus(weights: Tensor, share: float) -> Tensor:
    """[B, 1]: the smallest of the fewest weights of a row that add up to `share` of it."""
    goal = weights.sum(dim=-1, keepdim=True, dtype=torch.float64) * share
    count = min(LIKELIEST, weights.shape[-1])
    while True:
        descending = weights.topk(count, dim=-1).values
        sums = descending.cumsum(dim=-1, dtype=torch.float64)
        if count == weights.shape[-1] or bool((sums[:, -1:] >= goal).all()):
            place = (sums < goal).sum(dim=-1, keepdim=True).clamp(max=count - 1)
            return descending.gather(1, place)
        count = weights.shape[-1]
