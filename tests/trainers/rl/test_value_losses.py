"""The critic's loss by hand, clipped and not, and how much of the returns it explains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finetune_trainers.rl.value_losses import explained_variance, value_loss

# A step of 1 from an old value of 1, towards a return of 3, past one of 1.2, and padding.
VALUES = torch.tensor([[2.0, 2.0, math.nan]])
OLD = torch.tensor([[1.0, 1.0, math.nan]])
RETURNS = torch.tensor([[3.0, 1.2, math.nan]])
MASK = torch.tensor([[1, 1, 0]])


def test_the_worse_of_the_bounded_and_the_free_value_counts() -> None:
    found = value_loss(VALUES, OLD, RETURNS, MASK, clip=0.5)
    assert found.losses[0].tolist() == pytest.approx([1.5**2 / 2, 0.8**2 / 2, 0])
    assert found.clipfrac.item() == 0.5


def test_a_bound_that_is_not_reached_decides_on_no_token() -> None:
    values, old, returns = torch.randn(3, 100, 10, generator=torch.Generator().manual_seed(0))
    found = value_loss(values, old, returns, torch.ones_like(values), clip=10)
    assert found.clipfrac.item() == 0


def test_without_a_bound_it_is_half_the_squared_error() -> None:
    found = value_loss(VALUES, OLD, RETURNS, MASK, clip=None)
    assert found.losses[0].tolist() == pytest.approx([0.5, 0.32, 0])
    assert found.clipfrac.item() == 0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_what_is_masked_cannot_reach_the_gradient(clip: float | None) -> None:
    values = VALUES.clone().requires_grad_()
    value_loss(values, OLD, RETURNS, MASK, clip=clip).losses.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([-1.0 if clip is None else 0.0, 0.8, 0.0])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_are_those_of_small_differences(clip: float | None) -> None:
    old, returns = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[1.0, -1.0, 0.3, 2.0]], dtype=torch.float64)
    values = torch.tensor([[0.2, 0.4, 0.9, -0.7]], dtype=torch.float64, requires_grad=True)

    def losses(given: Tensor) -> Tensor:
        return value_loss(given, old, returns, torch.ones(1, 4), clip=clip).losses

    assert torch.autograd.gradcheck(losses, (values,))


def test_a_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="clip: 0 is not above 0"):
        value_loss(VALUES, OLD, RETURNS, MASK, clip=0)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        pytest.param([1.0, 2.0, 3.0], 1.0, id="a perfect critic"),
        pytest.param([2.0, 2.0, 2.0], 0.0, id="one that says nothing"),
        pytest.param([3.0, 2.0, 1.0], -3.0, id="one that is worse than nothing"),
    ],
)
def test_explained_variance(values: list[float], wanted: float) -> None:
    found = explained_variance(torch.tensor([values]), torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3))
    assert found.item() == pytest.approx(wanted)


def test_equal_returns_leave_nothing_to_explain() -> None:
    assert explained_variance(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), torch.ones(1, 2)).isnan()


def test_a_single_return_leaves_nothing_to_explain() -> None:
    assert explained_variance(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), torch.tensor([[1, 0]])).isnan()
