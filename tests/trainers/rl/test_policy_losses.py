"""PPO's clipped surrogate and its bounds, token by token and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainers.rl.policy_losses import PolicyLoss, log_prob_gap, ppo_policy_loss, truncated_importance


def loss_of(ratios: list[float], advantages: list[float], **settings: Any) -> PolicyLoss:
    log_probs = torch.tensor([ratios], dtype=torch.float64).log()
    gains = torch.tensor([advantages], dtype=torch.float64)
    return ppo_policy_loss(log_probs, torch.zeros_like(log_probs), gains, torch.ones_like(gains), **settings)


def test_the_bound_holds_where_a_step_would_go_on_and_not_where_it_would_come_back() -> None:
    found = loss_of([1.5, 0.5, 0.5, 1.5, 1.0], [1.0, 1.0, -1.0, -1.0, 2.0])
    assert found.losses[0].tolist() == pytest.approx([-1.2, -0.5, 0.8, 1.5, -2.0])
    assert found.clipfrac.item() == pytest.approx(2 / 5)


def test_rare_tokens_may_be_given_more_room_to_grow() -> None:
    assert loss_of([1.5, 0.5], [1.0, -1.0], clip_high=0.28).losses[0].tolist() == pytest.approx([-1.28, 0.8])


def test_one_token_of_an_enormous_ratio_cannot_ruin_an_update() -> None:
    found = loss_of([5.0, 5.0, 2.0, 0.5], [-1.0, 1.0, -1.0, -1.0], dual_clip=3.0)
    assert found.losses[0].tolist() == pytest.approx([3.0, -1.2, 2.0, 0.8])
    assert found.clipfrac.item() == pytest.approx(3 / 4)


def test_a_clipped_token_pulls_at_nothing() -> None:
    log_probs = torch.tensor([[1.5, 1.1, 5.0]]).log().requires_grad_()
    gains = torch.tensor([[1.0, 1.0, -1.0]])
    ppo_policy_loss(log_probs, torch.zeros(1, 3), gains, torch.ones(1, 3), dual_clip=3.0).losses.sum().backward()  # type: ignore[no-untyped-call]
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([0, -1.1, 0])


def test_the_distance_from_the_sampling_policy_is_measured_on_the_response_alone() -> None:
    log_probs = torch.tensor([[math.log(2), 0.0, math.nan, 400.0]])
    found = ppo_policy_loss(log_probs, torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([[1, 1, 0, 0]]))
    assert found.approx_kl.item() == pytest.approx((2 - 1 - math.log(2)) / 2)
    assert found.losses[0].tolist() == pytest.approx([-1.2, -1.0, 0, 0])


def test_what_is_masked_cannot_reach_the_gradient() -> None:
    log_probs = torch.tensor([[0.0, math.nan, 400.0]], requires_grad=True)
    found = ppo_policy_loss(log_probs, torch.zeros(1, 3), torch.ones(1), torch.tensor([[1, 0, 0]]))
    found.losses.sum().backward()  # type: ignore[no-untyped-call]
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == [-1, 0, 0]


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("gain", [1.0, 0.0, -1.0])
def test_a_token_that_became_likelier_beyond_measure_spoils_neither_loss_nor_gradient(
    gain: float, dual_clip: float | None
) -> None:
    """e^100 is infinite in float32, and 0 times that no number."""
    log_probs = torch.tensor([[100.0, 0.1]], requires_grad=True)
    gains = torch.tensor([[gain, 1.0]])
    found = ppo_policy_loss(log_probs, torch.zeros(1, 2), gains, torch.ones(1, 2), dual_clip=dual_clip)
    found.losses.sum().backward()  # type: ignore[no-untyped-call]
    assert found.losses.isfinite().all()
    assert found.approx_kl.isfinite()
    assert log_probs.grad is not None
    assert log_probs.grad[0].tolist() == pytest.approx([0, -math.exp(0.1)])


def test_one_advantage_may_serve_all_tokens_of_a_response() -> None:
    log_probs, mask = torch.zeros(2, 3), torch.ones(2, 3)
    found = ppo_policy_loss(log_probs, log_probs, torch.tensor([1.0, -2.0]), mask)
    assert found.losses.tolist() == [[-1] * 3, [2] * 3]


def naive(log_probs: Tensor, old: Tensor, gains: Tensor) -> Tensor:
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * gains, ratio.clamp(0.8, 1.28) * gains)


@settings(max_examples=50)
@given(st.integers(0, 1000))
def test_loss_and_gradient_are_those_of_the_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs, old, gains = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    log_probs.requires_grad_()
    found = ppo_policy_loss(log_probs, old, gains, torch.ones(2, 4), clip_high=0.28).losses
    wanted = naive(log_probs, old, gains)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), log_probs)[0] for loss in (found, wanted)))


def test_gradients_are_those_of_small_differences() -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    gains = torch.tensor([[1.0, -1.0, 2.0, -3.0]], dtype=torch.float64)
    log_probs = torch.tensor([[0.1, -0.1, 0.7, 1.5]], dtype=torch.float64, requires_grad=True)

    def losses(given: Tensor) -> Tensor:
        return ppo_policy_loss(given, old, gains, torch.ones(1, 4), dual_clip=3.0).losses

    assert torch.autograd.gradcheck(losses, (log_probs,))


def test_tokens_of_another_engine_are_weighed_up_to_the_cap() -> None:
    ours = torch.tensor([[math.log(0.5), math.log(0.9), math.log(0.2), math.nan]])
    engine = torch.tensor([[math.log(0.4), math.log(0.1), math.log(0.4), math.nan]])
    mask = torch.tensor([[1, 1, 1, 0]])
    weights = truncated_importance(ours, engine, mask)
    assert weights[0].tolist() == pytest.approx([1.25, 2.0, 0.5, 0.0])
    found = ppo_policy_loss(ours, ours, torch.ones(1), mask, weights=weights)
    assert found.losses[0].tolist() == pytest.approx([-1.25, -2.0, -0.5, 0.0])


def test_the_gap_between_engines_is_a_mean_of_sizes() -> None:
    gap = log_prob_gap(
        torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[-1.1, -1.7, 0]]), torch.tensor([[1, 1, 0]])
    )
    assert gap.item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.0}, "clip_low: 1.0 is not between 0 and 1"),
        ({"clip_high": 0.0}, "clip_high: 0.0 is not above 0"),
        ({"dual_clip": 1.2}, r"dual_clip: 1.2 is not above 1 \+ clip_high, 1.2"),
    ],
)
def test_bounds_that_leave_no_room_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of([1.0], [1.0], **settings)


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cap: 0.5 is below 1"):
        truncated_importance(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), cap=0.5)
