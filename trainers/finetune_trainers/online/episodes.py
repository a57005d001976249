"""Rollouts with all that is known of them, and the batches that are made of them.

    N  rollouts of an iteration      n  tokens of an answer      K  tokens of all answers of a micro-batch

Pure: no model, no ranks but by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from finetune_api.plan import BatchPlan
from finetune_trainers.data.batches import IGNORED, Batch, dummy_batch
from finetune_trainers.data.questions import Question
from finetune_trainers.rewards import Episode, Opinions

__all__ = ["Experience", "Rollout", "Said", "dealt", "in_forward_passes", "own_parts", "packed", "shuffled"]


@dataclass(frozen=True)
class Rollout:
    """One answer that the model wrote, and what it is worth. The same on every rank."""

    question: Question
    group: int
    """Which prompt of the iteration it answers."""
    ids: list[int]
    """Tokens of the answer, its end token included where there is one."""
    ended: bool
    """False: it was cut off."""
    text: str
    reward: float
    """Of all rewards, weighted; NaN where none could be had."""
    opinions: Opinions
    """Of each reward."""
    engine_log_probs: list[float] | None = None
    """Of `ids`, as the engine that drew them computed them. None: it was the policy itself."""
    policy_log_probs: list[float] | None = None
    """Of `ids`, as the policy computed them when it drew them. None: it has to be asked."""

    @property
    def episode(self) -> Episode:
        """As rewards see it."""
        return Episode(self.question.messages, self.text, self.question.fields, len(self.ids), self.ended)

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.question.ids) + len(self.ids)


@dataclass(frozen=True)
class Said:
    """What is known of the tokens of one answer beyond their ids: fp32 [n] each, on the CPU."""

    advantages: Tensor
    weights: Tensor
    """What each token's loss is multiplied with."""
    log_probs: Tensor | None = None
    """The policy's when it wrote them. None: it has not learned since, and is asked again anyway."""
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    importance: Tensor | None = None
    """What each token's loss is multiplied with because another engine drew it. None: the policy itself did."""


@dataclass(frozen=True)
class Experience(Batch):
    """A packed micro-batch of answers to learn from. Tensors are fp32 [K]."""

    advantages: Tensor | None = None
    weights: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    importance: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        moved = super().to(device)
        names = ("advantages", "weights", "old_log_probs", "ref_log_probs", "old_values", "returns", "importance")
        known = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(moved, **{name: value.to(device) for name, value in known.items()})


def dealt(prompts: Sequence[Sequence[int]], world_size: int, whole: bool) -> list[list[int]]:
    """Which of the answers to `prompts`, one to each, every rank writes. `whole`: equal prompts go to one rank, because
    all answers to one are found together."""
    parts: list[list[int]] = [[] for _ in range(world_size)]
    numbers: dict[object, int] = {}
    for index, prompt in enumerate(prompts):
        number = numbers.setdefault(tuple(prompt) if whole else index, len(numbers))
        parts[number % world_size].append(index)
    return parts


def packed(rollouts: Sequence[Rollout], said: Sequence[Said] = ()) -> Experience:
    """`rollouts` end to end in one row, every token of their answers to be predicted. None: a batch of one token."""
    if not rollouts:
        return _experience(dummy_batch(), [])
    lengths = [rollout.num_tokens for rollout in rollouts]
    ids = torch.tensor([token for rollout in rollouts for token in (*rollout.question.ids, *rollout.ids)])
    labels = torch.full_like(ids, IGNORED)
    ends = np.cumsum(lengths)
    for rollout, end in zip(rollouts, ends, strict=True):
        first = int(end) - len(rollout.ids)
        labels[first - 1 : int(end) - 1] = ids[first : int(end)]
    batch = Batch(
        input_ids=ids[None],
        labels=labels[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        max_seqlen=max(lengths),
        num_trained_tokens=sum(len(rollout.ids) for rollout in rollouts),
    )
    return _experience(batch, said)


def _experience(batch: Batch, said: Sequence[Said]) -> Experience:
    def all_of(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in said]
        return None if any(part is None for part in parts) else torch.cat([torch.zeros(0), *parts])

    return Experience(
        **vars(batch),
        advantages=all_of("advantages"),
        weights=all_of("weights"),
        old_log_probs=all_of("log_probs"),
        ref_log_probs=all_of("reference"),
        old_values=all_of("values"),
        returns=all_of("returns"),
        importance=all_of("importance"),
    )


def shuffled(num: int, seed: int, iteration: int, part: int) -> list[int]:
    """The numbers below `num` in an order of their own for each pass over an iteration."""
    order: list[int] = np.random.default_rng([seed, iteration, part]).permutation(num).tolist()
    return order


def own_parts(order: Sequence[int], batch: BatchPlan, rank: int) -> Iterator[list[int]]:
    """Those of a global batch that `rank` computes, micro-batch by micro-batch: as many on every rank."""
    micro, world = batch.micro_batch_size, batch.world_size
    for number in range(batch.gradient_accumulation_steps):
        start = (number * world + rank) * micro
        yield list(order[start : start + micro])


def in_forward_passes(rollouts: Sequence[Rollout], rank: int, world_size: int, size: int) -> Iterator[list[int]]:
    """Which of `rollouts` this rank asks models about, `size` at a time, those of like length together; as many passes
    on every rank, the last of them empty where there are no more."""
    by_length = sorted(range(len(rollouts)), key=lambda index: (rollouts[index].num_tokens, index))
    for start in range(0, len(by_length), size * world_size):
        yield by_length[start : start + size * world_size][rank::world_size]
