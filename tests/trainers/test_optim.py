"""Learning rate schedules against hand-worked numbers, and parameter groups of a small module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune_api.plan import LearningRatePlan
from finetune_api.spec import OptimizerSettings
from finetune_trainers.optim import adamw_arguments, lr_at, param_groups


def rates(total: int, schedule: str, warmup: float = 0.0, floor: float = 0.0, peak: float | None = 1.0) -> list[float]:
    plan = LearningRatePlan.model_validate(
        {"peak": peak, "reason": "", "schedule": schedule, "warmup_fraction": warmup, "min_fraction": floor}
    )
    return [lr_at(step, total, plan) for step in range(total)]


def test_a_constant_rate_is_the_peak_at_every_step() -> None:
    assert rates(3, "constant") == [1.0, 1.0, 1.0]


def test_warm_up_rises_in_equal_parts_and_the_step_after_it_uses_the_peak() -> None:
    assert rates(8, "constant", warmup=0.375) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_a_linear_rate_would_reach_zero_one_step_after_the_last() -> None:
    assert rates(4, "linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_cosine_rate_is_half_way_in_the_middle() -> None:
    assert rates(4, "cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


def test_the_floor_is_a_fraction_of_the_peak() -> None:
    assert rates(2, "linear", floor=0.5, peak=0.2) == pytest.approx([0.2, 0.15])
    assert rates(2, "cosine", floor=0.5, peak=0.2) == pytest.approx([0.2, 0.15])


def test_a_single_step_learns_at_the_peak() -> None:
    assert rates(1, "cosine") == [1.0]


def test_a_single_step_of_warm_up_still_learns() -> None:
    assert rates(1, "cosine", warmup=0.03) == [0.5]


def test_a_rate_that_nobody_has_settled_is_refused() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        rates(1, "cosine", peak=None)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.last = nn.Linear(3, 2, bias=False)


def test_biases_and_norms_are_not_decayed() -> None:
    decayed, plain = param_groups(Small(), weight_decay=0.1)
    assert (decayed.weight_decay, decayed.names) == (0.1, ["first.weight", "last.weight"])
    assert (plain.weight_decay, plain.names) == (0.0, ["first.bias", "norm.weight", "norm.bias"])


def test_frozen_parameters_are_in_no_group() -> None:
    model = Small()
    model.first.requires_grad_(False)
    names = [name for group in param_groups(model, 0.1) for name in group.names]
    assert names == ["last.weight", "norm.weight", "norm.bias"]


def test_each_step_of_unfreezing_has_groups_of_its_own() -> None:
    groups = param_groups(Small(), 0.1, {"first.weight": 0.5, "first.bias": 0.5, "norm.bias": 0.25})
    assert [(group.opens_at, group.weight_decay, group.names) for group in groups] == [
        (0.0, 0.1, ["last.weight"]),
        (0.0, 0.0, ["norm.weight"]),
        (0.25, 0.0, ["norm.bias"]),
        (0.5, 0.1, ["first.weight"]),
        (0.5, 0.0, ["first.bias"]),
    ]


def test_a_parameter_that_zero3_has_split_is_judged_by_its_whole_shape() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.empty(0)
    setattr(model.weight, "ds_shape", torch.Size([2, 2]))  # noqa: B010 - DeepSpeed adds it, torch does not know it
    (group,) = param_groups(model, 0.1)
    assert group.weight_decay == 0.1


def test_adamw_gets_the_settings_of_the_plan() -> None:
    settings = OptimizerSettings(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
    optimizer = torch.optim.AdamW(**adamw_arguments(param_groups(Small(), 0.1), settings))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)
