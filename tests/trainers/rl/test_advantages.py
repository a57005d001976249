"""GAE and the advantages within a group, by hand; then what must hold for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainers.rl.advantages import Baseline, gae, group_advantages, informative_groups, mask_of_lengths

BASELINES: tuple[Baseline, ...] = ("grpo", "dr_grpo", "rloo")
REWARDS, VALUES = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
BY_HAND = [0.21712, 0.246, 0.3]  # 0.04 + 0.72 · 0.246, 0.03 + 0.72 · 0.3, 1 - 0.7


def spread(values: Tensor, places: list[int], width: int, elsewhere: float) -> Tensor:
    """`values` [1, n] at `places` of a row that says `elsewhere` everywhere else."""
    row = torch.full((1, width), elsewhere)
    row[:, places] = values
    return row


def test_three_tokens_with_a_reward_at_the_end() -> None:
    found = gae(REWARDS, VALUES, torch.ones(1, 3), gamma=0.9, lam=0.8)
    assert found.advantages[0].tolist() == pytest.approx(BY_HAND)
    assert found.returns[0].tolist() == pytest.approx([0.71712, 0.846, 1.0])


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([0, 1, 2], id="padding on the right"),
        pytest.param([2, 3, 4], id="padding on the left"),
        pytest.param([0, 3, 4], id="a tool spoke in between"),
    ],
)
def test_positions_outside_the_mask_are_stepped_over(places: list[int]) -> None:
    mask = spread(torch.ones(1, 3), places, 5, 0.0)
    rewards, values = (spread(given, places, 5, math.nan) for given in (REWARDS, VALUES))
    found = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    assert found.advantages[0, places].tolist() == pytest.approx(BY_HAND)
    assert found.advantages.sum().item() == pytest.approx(sum(BY_HAND))
    assert found.returns.sum().item() == pytest.approx(0.71712 + 0.846 + 1.0)


NUMBERS = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8)


@settings(max_examples=50)
@given(NUMBERS, st.data())
def test_without_discount_the_returns_are_the_rewards_still_to_come(numbers: list[float], data: st.DataObject) -> None:
    size = len(numbers)
    rewards = torch.tensor([numbers], dtype=torch.float64)
    values = torch.tensor([data.draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size))], dtype=torch.float64)
    found = gae(rewards, values, torch.ones(1, size), gamma=1.0, lam=1.0)
    assert found.returns[0].tolist() == pytest.approx([sum(numbers[place:]) for place in range(size)])


@settings(max_examples=50)
@given(NUMBERS, st.floats(0, 1))
def test_a_critic_that_is_right_leaves_no_advantage(numbers: list[float], lam: float) -> None:
    values = torch.tensor([[sum(numbers[place:]) for place in range(len(numbers))]], dtype=torch.float64)
    found = gae(torch.tensor([numbers], dtype=torch.float64), values, torch.ones_like(values), gamma=1.0, lam=lam)
    assert found.advantages.abs().max().item() == pytest.approx(0, abs=1e-9)


def test_nothing_of_an_advantage_carries_a_gradient() -> None:
    found = gae(REWARDS, VALUES.clone().requires_grad_(), torch.ones(1, 3), gamma=0.9, lam=0.8)
    assert not found.advantages.requires_grad
    assert not found.returns.requires_grad


def test_lengths_become_a_mask() -> None:
    assert mask_of_lengths(torch.tensor([2, 0, 3]), 3).int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("baseline", "wanted"),
    [
        pytest.param("grpo", [1.5, -0.5], id="less the mean, over the deviation of a half"),
        pytest.param("dr_grpo", [0.75, -0.25], id="less the mean"),
        pytest.param("rloo", [1.0, -1 / 3], id="less the mean of the others"),
    ],
)
def test_one_of_four_is_right(baseline: Baseline, wanted: list[float]) -> None:
    found = group_advantages(torch.tensor([1.0, 0, 0, 0]), 4, baseline, eps=0)
    assert found.tolist() == pytest.approx([wanted[0], *[wanted[1]] * 3])


def test_each_group_is_compared_with_itself_alone() -> None:
    found = group_advantages(torch.tensor([1.0, 3.0, 10.0, 10.0]), 2, "dr_grpo")
    assert found.tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize(("baseline", "wanted"), [("grpo", 0.5 / math.sqrt(0.5)), ("dr_grpo", 0.5), ("rloo", 1.0)])
def test_a_response_without_a_score_counts_for_nobody(baseline: Baseline, wanted: float) -> None:
    found = group_advantages(torch.tensor([1.0, math.nan, 0.0]), 3, baseline, eps=0)
    assert found.tolist() == pytest.approx([wanted, 0, -wanted])


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_response_left_alone_by_its_group_gets_nothing(baseline: Baseline) -> None:
    assert group_advantages(torch.tensor([5.0, math.nan, math.nan, math.nan]), 2, baseline).tolist() == [0] * 4


GROUPS = st.lists(st.lists(st.floats(-10, 10), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(max_examples=50)
@given(GROUPS, st.sampled_from(BASELINES))
def test_the_advantages_of_a_group_sum_to_zero(groups: list[list[float]], baseline: Baseline) -> None:
    found = group_advantages(torch.tensor(groups, dtype=torch.float64).flatten(), 4, baseline)
    assert found.view(-1, 4).sum(1).abs().max().item() == pytest.approx(0, abs=1e-9)


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.floats(-100, 100))
def test_a_reward_added_to_all_changes_no_advantage(rewards: list[float], shift: float) -> None:
    given_rewards = torch.tensor(rewards, dtype=torch.float64)
    for baseline in BASELINES:
        one, other = (group_advantages(given_rewards + by, 4, baseline) for by in (0.0, shift))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_groups_that_are_all_right_or_all_wrong_teach_nothing() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, math.nan, 1.0, math.nan, math.nan])
    assert informative_groups(rewards, 2).tolist() == [False, False, True, False, False]


def test_groups_that_cannot_be_formed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards \[5\] are not whole groups of 2"):
        group_advantages(torch.zeros(5), 2, "grpo")
    with pytest.raises(ValueError, match="group_size: 1 is below 2"):
        informative_groups(torch.zeros(5), 1)
