"""What a rank is to write, for those who write it a forward pass at a time. Made by `in_process`.

B  rows of a batch      N  new tokens of a row      V  words of the vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from finetune_trainers.rollout import Request, Sampling
from finetune_trainers.rollout.row_cache import RowCache

__all__ = ["Forward", "Task"]

Forward = Callable[[Sequence[Sequence[int]], Sequence[int], RowCache], Tensor]
"""Logits [B, V] behind the new tokens [B, N] of rows that begin after so many columns [B] of the cache."""


@dataclass(frozen=True)
class Task:
    """One rank's answers, and the model that gives them."""

    forward: Forward
    requests: Sequence[Request]
    sampling: Sampling
    pad_id: int
    end_ids: frozenset[int]
