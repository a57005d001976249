"""What is done to a score before it becomes the reward of tokens, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainers.rl.rewards import (
    clip_scores,
    normalise_scores,
    overlong_penalty,
    penalise_missing_eos,
    token_rewards,
)
from finetune_trainers.rl.statistics import Moments


def test_scores_are_held_within_the_limit() -> None:
    assert clip_scores(torch.tensor([-7.0, -1.0, 0.5, 9.0]), 5).tolist() == [-5, -1, 0.5, 5]
    with pytest.raises(ValueError, match="limit: 0 is not above 0"):
        clip_scores(torch.zeros(1), 0)


def test_scores_are_measured_by_all_scores_so_far_and_keep_their_sign() -> None:
    scores, seen = normalise_scores(torch.tensor([-1.0, 1.0, 3.0]), Moments())
    assert scores.tolist() == pytest.approx([-0.5, 0.5, 1.5])
    # -1, 1, 3 and 5: mean 2, variance (9 + 1 + 1 + 9) / 3
    scores, seen = normalise_scores(torch.tensor([5.0]), seen)
    assert scores.item() == pytest.approx(5 / math.sqrt(20 / 3))
    assert seen.mean == pytest.approx(2)


def test_the_first_score_of_all_passes_unchanged() -> None:
    scores, seen = normalise_scores(torch.tensor([4.0]), Moments())
    assert scores.tolist() == [4]
    assert seen == Moments(1, 4, 0)


@pytest.mark.parametrize("scores", [[1.0] * 4, [-1.0] * 8, [0.0, 0.0], [100.0, 100.5]])
def test_scores_that_are_as_good_as_equal_pass_unchanged(scores: list[float]) -> None:
    found, seen = normalise_scores(torch.tensor(scores), Moments())
    assert found.tolist() == scores
    assert seen.count == len(scores)


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=20))
def test_a_run_that_was_resumed_normalises_as_if_it_had_not_stopped(numbers: list[float]) -> None:
    scores = torch.tensor(numbers)
    _, before = normalise_scores(scores[:3], Moments())
    resumed = Moments(**json.loads(json.dumps(before.state())))
    assert normalise_scores(scores[3:], resumed)[1] == normalise_scores(scores[3:], before)[1]
    assert normalise_scores(scores[3:], resumed)[0].tolist() == normalise_scores(scores[3:], before)[0].tolist()


def test_a_response_without_an_end_pays_for_it() -> None:
    assert penalise_missing_eos(torch.tensor([2.0, 2.0]), torch.tensor([True, False]), 1.5).tolist() == [2, 0.5]


def test_the_last_tokens_of_what_is_allowed_cost_more_and_more() -> None:
    found = overlong_penalty(torch.tensor([1, 15, 16, 18, 20, 25]), max_length=20, buffer=5)
    assert found.tolist() == pytest.approx([0, 0, -0.2, -0.6, -1, -1])
    with pytest.raises(ValueError, match="buffer: 21 is not from 1 to the longest response, 20"):
        overlong_penalty(torch.tensor([1]), max_length=20, buffer=21)


def test_every_token_pays_for_its_distance_and_the_last_one_gets_the_score() -> None:
    kl = torch.tensor([[0.1, 0.2, math.nan], [math.nan, 0.3, -0.1], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    found = token_rewards(torch.tensor([1.0, -2.0, 5.0]), mask, kl, 0.5)
    assert found.flatten().tolist() == pytest.approx([-0.05, 0.9, 0, 0, -0.15, -1.95, 0, 0, 0])
