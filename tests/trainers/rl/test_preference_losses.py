"""DPO, KTO, ORPO and the reward model's loss by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainers.rl.preference_losses import DpoKind, dpo_loss, kto_loss, orpo_loss, reward_loss

# Chosen became e^½ times as likely as under the reference, rejected e^-½ times: a gap of 1.
PAIR = (torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([-1.5]), torch.tensor([-1.5]))
KINDS: tuple[DpoKind, ...] = ("sigmoid", "hinge", "ipo")


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing", "wanted"),
    [
        pytest.param("sigmoid", 0.5, 0.0, 0.4740770, id="log(1 + e^-½)"),
        pytest.param("sigmoid", 0.5, 0.1, 0.5240770, id="0.9 · 0.4740770 + 0.1 · 0.9740770"),
        pytest.param("hinge", 0.5, 0.0, 0.5, id="1 - ½"),
        pytest.param("hinge", 2.0, 0.0, 0.0, id="far enough apart"),
        pytest.param("ipo", 0.5, 0.0, 0.0, id="exactly as far apart as wanted"),
        pytest.param("ipo", 0.25, 0.0, 1.0, id="one too near"),
    ],
)
def test_a_pair_with_a_gap_of_one(kind: DpoKind, beta: float, smoothing: float, wanted: float) -> None:
    found = dpo_loss(*PAIR, beta=beta, kind=kind, label_smoothing=smoothing)
    assert found.losses.item() == pytest.approx(wanted, abs=1e-6)
    assert found.chosen_rewards.item() == pytest.approx(beta / 2)
    assert found.rejected_rewards.item() == pytest.approx(-beta / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_dpo_are_those_of_small_differences(kind: DpoKind) -> None:
    smoothing = 0.1 if kind == "sigmoid" else 0.0
    chosen, rejected, *references = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def losses(one: Tensor, other: Tensor) -> Tensor:
        return dpo_loss(one, other, *references, beta=0.3, kind=kind, label_smoothing=smoothing).losses

    assert torch.autograd.gradcheck(losses, (chosen.requires_grad_(), rejected.requires_grad_()))


@settings(max_examples=50)
@given(st.floats(-50, 50), st.floats(0.01, 2), st.sampled_from(KINDS))
def test_only_the_distance_to_the_reference_matters(shift: float, beta: float, kind: DpoKind) -> None:
    moved = [side.double() + shift for side in PAIR]
    one, other = (dpo_loss(*pair, beta=beta, kind=kind).losses for pair in ([side.double() for side in PAIR], moved))
    torch.testing.assert_close(one, other)


def test_settings_of_dpo_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match="beta: 0 is not above 0"):
        dpo_loss(*PAIR, beta=0)
    with pytest.raises(ValueError, match=r"label_smoothing: 0.5 is not from 0 to below 0.5"):
        dpo_loss(*PAIR, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"label_smoothing: 0.1 has no meaning for ipo; leave it 0"):
        dpo_loss(*PAIR, beta=0.1, kind="ipo", label_smoothing=0.1)


def test_rows_that_are_liked_and_rows_that_are_not() -> None:
    log_probs, references = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0])
    found = kto_loss(log_probs, references, torch.tensor([True, False]), torch.tensor(0.2), beta=0.5)
    assert found.tolist() == pytest.approx([0.4013123, 0.5986877])  # s(-0.4) and s(0.4)
    weighted = kto_loss(
        log_probs,
        references,
        torch.tensor([True, False]),
        torch.tensor(0.2),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    assert weighted.tolist() == pytest.approx([2 * 0.4013123, 3 * 0.5986877])


def test_the_weights_are_as_exact_as_the_log_probabilities() -> None:
    nothing = torch.zeros(1, dtype=torch.float64)
    assert kto_loss(nothing, nothing, nothing > 1, nothing, beta=0.1, undesirable_weight=1.33).item() == 1.33 / 2


def test_gradients_of_kto_are_those_of_small_differences() -> None:
    desirable, kl = torch.tensor([True, False, True]), torch.tensor(0.1, dtype=torch.float64)
    log_probs, references = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda given: kto_loss(given, references, desirable, kl, beta=0.3, undesirable_weight=1.5),
        (log_probs.requires_grad_(),),
    )


def test_odds_of_one_against_odds_of_a_third() -> None:
    chosen, rejected = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    found = orpo_loss(chosen, rejected, -chosen, beta=0.1)
    assert found.item() == pytest.approx(0.6931472 + 0.1 * 0.2876821)  # -log s(log 3) = -log 0.75


def test_odds_keep_their_digits_and_their_gradient_at_both_ends() -> None:
    chosen = torch.tensor([-1e-20, -60.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-60.0, -1e-20], dtype=torch.float64)
    losses = orpo_loss(chosen, rejected, torch.zeros(2, dtype=torch.float64), beta=1.0)
    # The log odds at -1e-20 are -log(1e-20) = 46.0517, at -60 they are -60; exp(-1e-20) is 1.
    assert losses.tolist() == pytest.approx([0.0, 60 + 46.0517], abs=1e-3)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_answer_that_rounding_makes_certain_has_the_loss_and_the_gradient_of_almost_certain(
    dtype: torch.dtype,
) -> None:
    """With odds of 1 to 3 on the other side, d: what is missing to certainty.

    Chosen at -d: log s has the slope (1/3) / (1 + d/3), which is 1/3. Rejected at -d: -log s is -log(d / (3 + d))
    about, and the slope 1 / d.
    """
    eps = torch.finfo(dtype).eps
    third = math.log(0.25)
    chosen = torch.tensor([0.0, third], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([third, 0.0], dtype=dtype, requires_grad=True)
    losses = orpo_loss(chosen, rejected, torch.zeros(2, dtype=dtype), beta=1.0)
    assert losses.tolist() == pytest.approx([0.0, math.log(3 / eps)], rel=1e-6, abs=2 * eps)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad[0].item() == pytest.approx(-1 / 3, rel=1e-5)
    assert rejected.grad[1].item() == pytest.approx(1 / eps, rel=1e-5)
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


def test_gradients_of_orpo_are_those_of_small_differences() -> None:
    chosen = torch.tensor([-0.1, -0.6, -0.8, -3.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.5, -0.9, -0.2, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one, other: orpo_loss(one, other, -one, beta=0.3), (chosen, rejected))


def test_a_better_score_by_one_and_by_one_less_a_margin() -> None:
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    assert reward_loss(chosen, rejected).item() == pytest.approx(0.3132617)
    assert reward_loss(chosen, rejected, torch.tensor([0.5])).item() == pytest.approx(0.4740770)
    assert reward_loss(chosen, rejected, center_coefficient=0.01).item() == pytest.approx(0.3132617 + 0.09)


@settings(max_examples=50)
@given(st.floats(-30, 30))
def test_only_the_difference_of_scores_matters_until_they_are_centred(shift: float) -> None:
    chosen, rejected = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    torch.testing.assert_close(reward_loss(chosen + shift, rejected + shift), reward_loss(chosen, rejected))
