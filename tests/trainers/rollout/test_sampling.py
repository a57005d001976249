"""Which token a number stands for: the distribution as it is, and cut by top-k and top-p."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from finetune_trainers.rollout import Sampling
from finetune_trainers.rollout.sampling import LIKELIEST, draw, uniforms

PROBABILITIES = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor(PROBABILITIES).log()


def sampling(**settings: Any) -> Sampling:
    return Sampling(max_new_tokens=1, **settings)


def drawn(logits: torch.Tensor, numbers: Any, **settings: Any) -> list[int]:
    """The tokens that `numbers` stand for in one distribution [V]."""
    given = torch.as_tensor(numbers, dtype=torch.float64)
    tokens: list[int] = draw(logits.expand(len(given), -1), given, sampling(**settings))[0].tolist()
    return tokens


def test_a_number_falls_where_the_probabilities_laid_end_to_end_have_it() -> None:
    numbers = [0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.6999, 0.7001, 1 - 2**-53]
    assert drawn(LOGITS, numbers) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    count = 20_000
    tokens = drawn(LOGITS, uniforms(7, count), temperature=temperature)
    expected = torch.softmax(LOGITS / temperature, dim=-1).double().numpy() * count
    found = np.bincount(tokens, minlength=4)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 16.3, "of three degrees of freedom, one seed in a thousand is above"


def test_log_probabilities_are_those_at_the_temperature_whatever_is_left_out() -> None:
    numbers = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    given = sampling(temperature=0.7, top_k=2, top_p=0.9)
    tokens, log_probs = draw(LOGITS.expand(3, -1), numbers, given)
    wanted = torch.log_softmax(LOGITS.double() / 0.7, dim=-1)[tokens]
    torch.testing.assert_close(log_probs, wanted, atol=1e-6, rtol=0)


def test_temperature_zero_takes_the_likeliest_and_says_its_plain_probability() -> None:
    tokens, log_probs = draw(LOGITS[None], torch.tensor([0.99], dtype=torch.float64), sampling(temperature=0.0))
    assert tokens.tolist() == [1]
    assert log_probs.item() == pytest.approx(math.log(0.4), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        pytest.param({"top_k": 1}, {1}, id="the likeliest"),
        pytest.param({"top_k": 3}, {1, 2, 3}, id="three"),
        pytest.param({"top_k": 99}, {0, 1, 2, 3}, id="more than there are"),
        pytest.param({"top_p": 0.39}, {1}, id="less than the likeliest has"),
        pytest.param({"top_p": 0.69}, {1, 3}, id="two that reach it"),
        pytest.param({"top_p": 0.71}, {1, 2, 3}, id="two do not reach it"),
        pytest.param({"top_p": 0.9999}, {0, 1, 2, 3}, id="nearly all"),
        # of 0.4, 0.3 and 0.2 the first two have 0.78
        pytest.param({"top_k": 3, "top_p": 0.77}, {1, 3}, id="top-p of what top-k leaves"),
    ],
)
def test_only_tokens_that_are_likely_enough_are_drawn(settings: dict[str, Any], allowed: set[int]) -> None:
    tokens = drawn(LOGITS, uniforms(3, 2000), **settings)
    assert set(tokens) == allowed
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    total = sum(PROBABILITIES[token] for token in allowed)
    for token in allowed:
        assert shares[token] == pytest.approx(PROBABILITIES[token] / total, abs=0.04)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.45}])
def test_tokens_as_likely_as_the_last_one_that_stays_stay_too(settings: dict[str, Any]) -> None:
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()
    assert set(drawn(logits, uniforms(1, 500), **settings)) == {0, 1, 2, 3}


def test_a_flat_distribution_is_looked_at_beyond_its_likeliest_tokens() -> None:
    size = 4 * LIKELIEST
    logits = torch.linspace(1e-3, 0.0, size)
    tokens = drawn(logits, uniforms(5, 20_000), top_p=0.5)
    assert size * 0.49 < max(tokens) < size * 0.51
    assert len(set(tokens)) > size * 0.49


def test_a_row_is_drawn_alike_whatever_the_rows_beside_it_need() -> None:
    size = 4 * LIKELIEST
    peaked = torch.cat([torch.tensor([8.0, 7.0, 6.0]), torch.zeros(size - 3)])
    flat = torch.zeros(size)
    number = torch.tensor([0.97], dtype=torch.float64)
    settings = sampling(top_p=0.3)
    alone = draw(peaked[None], number, settings)
    together = draw(torch.stack([flat, peaked]), number.expand(2), settings)
    assert together[0][1] == alone[0][0]
    assert together[1][1] == alone[1][0]


def test_equal_seeds_give_equal_numbers_and_a_longer_answer_begins_like_a_shorter_one() -> None:
    assert uniforms(11, 50).tolist()[:20] == uniforms(11, 20).tolist()
    assert uniforms(11, 20).tolist() != uniforms(12, 20).tolist()
    assert uniforms(1 << 40, 4).tolist() != uniforms(0, 4).tolist(), "all bits of a seed count"
    assert ((uniforms(2, 10_000) >= 0) & (uniforms(2, 10_000) < 1)).all()


def test_logits_that_are_not_finite_show_in_the_log_probability_and_nowhere_else() -> None:
    logits = torch.tensor([[math.nan, 0.0, 1.0]])
    for settings in (sampling(), sampling(temperature=0.0), sampling(top_p=0.5), sampling(top_k=2)):
        tokens, log_probs = draw(logits, torch.tensor([0.5], dtype=torch.float64), settings)
        assert 0 <= tokens.item() < 3
        assert not math.isfinite(log_probs.item())
