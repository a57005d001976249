"""Rollouts as batches: what is predicted, who computes it, and in which order it is learned from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.plan import BatchPlan
from finetune_trainers.data.batches import IGNORED
from finetune_trainers.data.questions import Question
from finetune_trainers.online.episodes import (
    Rollout,
    Said,
    in_forward_passes,
    own_parts,
    packed,
    shuffled,
)


def rollout(prompt: Sequence[int], answer: Sequence[int]) -> Rollout:
    question = Question(list(prompt), [{"role": "user", "content": "?"}], {}, 0, 0)
    return Rollout(question, 0, list(answer), True, "", 1.0, {})


def test_every_token_of_an_answer_is_predicted_and_none_of_a_prompt() -> None:
    batch = packed([rollout([5, 6, 7], [8, 9]), rollout([1], [2, 3, 4])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 8, 9, IGNORED, 2, 3, 4, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 5, 9]
    assert (batch.max_seqlen, batch.num_trained_tokens) == (5, 5)


def test_what_is_known_of_tokens_lies_as_the_tokens_do() -> None:
    said = [
        Said(torch.tensor([1.0, 2.0]), torch.ones(2), torch.tensor([-1.0, -2.0])),
        Said(torch.tensor([3.0]), torch.ones(1), torch.tensor([-3.0])),
    ]
    batch = packed([rollout([5], [8, 9]), rollout([1], [2])], said).to(torch.device("cpu"))
    assert batch.advantages is not None
    assert batch.old_log_probs is not None
    assert batch.advantages.tolist() == [1.0, 2.0, 3.0]
    assert batch.old_log_probs.tolist() == [-1.0, -2.0, -3.0]
    assert batch.returns is None


def test_a_rank_that_has_nothing_left_asks_about_one_token_that_nobody_learns() -> None:
    batch = packed([])
    assert batch.input_ids.shape == (1, 1)
    assert batch.num_trained_tokens == 0
    assert batch.advantages is not None
    assert batch.advantages.tolist() == []


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))
def test_all_ranks_together_learn_each_rollout_of_a_step_once(
    world: int, micro: int, accumulated: int, seed: int
) -> None:
    total = world * micro * accumulated
    order = shuffled(total, seed, 3, 1)
    plans = BatchPlan(
        global_batch_size=total, micro_batch_size=micro, gradient_accumulation_steps=accumulated, world_size=world
    )
    parts = [list(own_parts(order, plans, rank)) for rank in range(world)]
    assert {len(part) for part in parts} == {accumulated}
    assert sorted(index for part in parts for one in part for index in one) == list(range(total))


@given(st.lists(st.integers(1, 9), min_size=0, max_size=20), st.integers(1, 4), st.integers(1, 5))
def test_all_ranks_together_ask_about_each_rollout_once_in_as_many_passes(
    lengths: list[int], world: int, size: int
) -> None:
    rollouts = [rollout([1], [2] * length) for length in lengths]
    passes = [list(in_forward_passes(rollouts, rank, world, size)) for rank in range(world)]
    assert len({len(part) for part in passes}) == 1
    assert sorted(index for part in passes for one in part for index in one) == list(range(len(rollouts)))
    assert all(len(one) <= size for part in passes for one in part)


@pytest.mark.parametrize("other", [(8, 1, 3, 0), (8, 0, 4, 0), (8, 0, 3, 1)])
def test_each_pass_over_an_iteration_has_an_order_of_its_own(other: tuple[int, int, int, int]) -> None:
    assert shuffled(8, 0, 3, 0) == shuffled(8, 0, 3, 0)
    assert shuffled(*other) != shuffled(8, 0, 3, 0)
