"""From losses per token to one number: three ways by hand, and any cut into micro-batches."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainers.rl.aggregation import Aggregation, aggregate, divisor

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, 9.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
WAYS: tuple[Aggregation, ...] = ("token", "sequence", "constant")


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [
        pytest.param("token", 2.5, id="10 over 4 tokens"),
        pytest.param("sequence", 3.0, id="means of 2 and 4"),
        pytest.param("constant", 1.0, id="10 over 2 times 5"),
    ],
)
def test_a_long_and_a_short_response(aggregation: Aggregation, wanted: float) -> None:
    total = divisor(MASK, aggregation, max_length=5)
    assert aggregate(LOSSES, MASK, aggregation, total).item() == pytest.approx(wanted)


@settings(max_examples=50)
@given(st.sampled_from(WAYS), st.integers(0, 1000), st.lists(st.integers(0, 6), max_size=3))
def test_micro_batches_add_up_however_the_batch_is_cut(aggregation: Aggregation, seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 4, generator=generator) < 0.7
    mask[0, 0] = True
    ends = [0, *sorted(cuts), 6]
    parts = [slice(*ends_of) for ends_of in pairwise(ends)]
    total = sum(divisor(mask[part], aggregation, max_length=4) for part in parts)
    found = sum(aggregate(losses[part], mask[part], aggregation, total).item() for part in parts)
    whole = aggregate(losses, mask, aggregation, divisor(mask, aggregation, max_length=4))
    assert found == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("aggregation", WAYS)
def test_gradients_are_those_of_small_differences(aggregation: Aggregation) -> None:
    losses = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    total = divisor(MASK, aggregation, max_length=5)
    assert torch.autograd.gradcheck(lambda given: aggregate(given, MASK, aggregation, total), (losses,))


def test_sixteen_bit_losses_are_summed_in_thirty_two() -> None:
    losses = torch.ones(1, 1001, dtype=torch.bfloat16)  # 1001 is 1000 in bfloat16
    assert aggregate(losses, torch.ones(1, 1001), "token", 1.0).item() == 1001


def test_a_response_without_a_token_counts_as_a_response_of_no_loss() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert aggregate(LOSSES, mask, "sequence", divisor(mask, "sequence")).item() == 1


def test_a_batch_with_nothing_to_learn_and_a_missing_length_are_refused() -> None:
    nothing = torch.zeros_like(MASK)
    with pytest.raises(ValueError, match=r"total: 0.0 is not above 0; no token of the global batch is trained on"):
        aggregate(LOSSES, nothing, "token", divisor(nothing, "token"))
    with pytest.raises(ValueError, match="max_length: None is no length, and 'constant' divides by it"):
        divisor(MASK, "constant")
