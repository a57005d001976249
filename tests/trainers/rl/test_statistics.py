"""Masked means and variances by hand, whitening as a property, and moments that do not care how they were cut."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainers.rl.statistics import Moments, masked_mean, masked_sum, masked_var, merge, moments_of, whiten

VALUES = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -math.inf]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
NUMBERS = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30)


def test_what_is_masked_is_never_read() -> None:
    assert masked_sum(VALUES, MASK).item() == 9
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3, 6]
    assert masked_mean(VALUES, MASK).item() == 3
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [1.5, 6]


def test_the_variance_is_over_n_less_one_unless_told_otherwise() -> None:
    assert masked_var(VALUES, MASK).item() == 7  # (4 + 1 + 9) / 2
    assert masked_var(VALUES, MASK, unbiased=False).item() == pytest.approx(14 / 3)


def test_the_mean_of_nothing_is_zero_and_its_variance_an_error() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_mean(VALUES, nothing).item() == 0
    with pytest.raises(ValueError, match="the variance of 0 values"):
        masked_var(VALUES, nothing)
    with pytest.raises(ValueError, match="the variance of 1 values"):
        Moments(1, 5.0).var()


def test_whitening_by_hand() -> None:
    white = whiten(VALUES, MASK, eps=0)
    root = math.sqrt(7)
    assert white.flatten().tolist() == pytest.approx([-2 / root, -1 / root, 0, 3 / root, 0, 0])


def test_the_only_value_is_left_as_it_is() -> None:
    assert whiten(torch.tensor([3.0, math.nan]), torch.tensor([1, 0])).tolist() == [3, 0]


@settings(max_examples=50)
@given(NUMBERS, st.data())
def test_what_was_whitened_has_mean_0_and_variance_1(numbers: list[float], data: st.DataObject) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers))))
    mask[:2] = True
    values[0] = values[1] + 1  # so that there is something to whiten
    white = whiten(values, mask)
    assert masked_mean(white, mask).item() == pytest.approx(0, abs=1e-9)
    assert masked_var(white, mask).item() == pytest.approx(1, rel=1e-6)
    assert not white[~mask].any()


@settings(max_examples=50)
@given(NUMBERS, st.integers(0, 30), st.integers(0, 30))
def test_moments_merged_are_moments_taken_at_once(numbers: list[float], one: int, other: int) -> None:
    values = torch.tensor(numbers)
    first, second = sorted((one, other))
    parts = [moments_of(part) for part in (values[:first], values[first:second], values[second:])]
    merged, whole = merge(parts), moments_of(values)
    assert merged.count == whole.count
    assert merged.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-9)
    assert merged.var() == pytest.approx(whole.var(), rel=1e-9, abs=1e-9)


def test_moments_far_from_zero_keep_their_variance() -> None:
    """Sums of squares would have lost it: 1e9² + 1 is 1e9² in float64."""
    near: Tensor = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    merged = merge([moments_of(near[:2] + 1e9), moments_of(near[2:] + 1e9)])
    assert merged.var() == pytest.approx(5 / 3)


def test_moments_come_back_from_a_checkpoint() -> None:
    moments = moments_of(VALUES, MASK)
    assert moments == Moments(3, 3, 14)
    assert Moments(**json.loads(json.dumps(moments.state()))) == moments
