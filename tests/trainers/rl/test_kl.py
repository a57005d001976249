"""Estimators of the distance by hand and in expectation; controllers by the numbers of their paper."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainers.rl.kl import AdaptiveKl, FixedKl, KlEstimator, controller_from_state, kl_estimate


@pytest.mark.parametrize(("estimator", "wanted"), [("k1", 0.6931472), ("k2", 0.2402265), ("k3", 0.1931472)])
def test_a_token_that_became_twice_as_likely(estimator: KlEstimator, wanted: float) -> None:
    found = kl_estimate(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), estimator)
    assert found.item() == pytest.approx(wanted)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_what_the_policy_says_is_the_divergence_itself(estimator: KlEstimator) -> None:
    policy, reference = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.4, 0.4, 0.2])
    found = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()
    assert found.item() == pytest.approx((policy * (policy / reference).log()).sum().item())


NEVER_NEGATIVE: tuple[KlEstimator, ...] = ("k2", "k3")
LOG_PROBS = st.lists(st.floats(-20, -1e-6), min_size=1, max_size=10)


@settings(max_examples=50)
@given(LOG_PROBS, st.floats(-3, 3))
def test_k2_and_k3_are_never_negative_and_nothing_where_the_policies_agree(numbers: list[float], gap: float) -> None:
    log_probs = torch.tensor(numbers, dtype=torch.float64)
    for estimator in NEVER_NEGATIVE:
        assert (kl_estimate(log_probs, log_probs + gap, estimator) >= -1e-15).all()
        assert not kl_estimate(log_probs, log_probs, estimator).any()


def test_k3_keeps_its_digits_where_the_policies_are_close() -> None:
    gap = 3e-4  # exp of it is off by as much as k3 is large, in float32
    found = kl_estimate(torch.tensor([0.0]), torch.tensor([gap]), "k3")
    assert found.item() == pytest.approx(gap**2 / 2 + gap**3 / 6, rel=1e-2)


def test_k3_of_a_token_that_the_reference_finds_likelier_beyond_measure_is_finite() -> None:
    log_probs = torch.tensor([-100.0, -1000.0], requires_grad=True)
    found = kl_estimate(log_probs, torch.zeros(2), "k3")
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert found.tolist() == [pytest.approx(math.exp(20), rel=1e-6)] * 2
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [0, 0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_are_those_of_small_differences(estimator: KlEstimator) -> None:
    log_probs = torch.tensor([-1.0, -0.3, -2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.2, -0.1, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: kl_estimate(given, reference, estimator), (log_probs,))


def test_a_fixed_price_stays() -> None:
    assert FixedKl(0.05).updated(100.0, 512) == FixedKl(0.05)


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        pytest.param(12.0, 0.100512, id="twice the target counts as 20 percent above it"),
        pytest.param(6.6, 0.100256, id="ten percent above"),
        pytest.param(6.0, 0.1, id="on the target"),
        pytest.param(5.4, 0.099744, id="ten percent below"),
        pytest.param(-1.0, 0.099488, id="an estimate may be negative"),
    ],
)
def test_an_adaptive_price_follows_the_distance(kl: float, wanted: float) -> None:
    assert AdaptiveKl(0.1, target=6.0, horizon=10_000).updated(kl, 256).coefficient == pytest.approx(wanted)


@pytest.mark.parametrize(("kl", "wanted"), [(12.0, 0.12), (0.0, 0.08)])
@pytest.mark.parametrize("num_episodes", [100, 500, 100_000])
def test_one_measurement_moves_the_price_by_a_fifth_at_most(num_episodes: int, kl: float, wanted: float) -> None:
    assert AdaptiveKl(0.1, 6.0, horizon=100).updated(kl, num_episodes).coefficient == pytest.approx(wanted)


def test_a_policy_that_drifts_in_proportion_comes_to_rest_on_the_target() -> None:
    """A distance of 0.6 / price: the controller finds the price of 0.1 from both sides."""
    for start in (0.01, 1.0):
        controller = AdaptiveKl(start, target=6.0, horizon=1000)
        for _ in range(200):
            controller = controller.updated(0.6 / controller.coefficient, 500)
        assert controller.coefficient == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("controller", [FixedKl(0.05), AdaptiveKl(0.1, 6.0, horizon=500).updated(7.0, 64)])
def test_a_controller_comes_back_from_a_checkpoint(controller: FixedKl | AdaptiveKl) -> None:
    assert controller_from_state(json.loads(json.dumps(controller.state()))) == controller


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_distance_that_is_no_number_never_becomes_a_price(kl: float) -> None:
    for controller in (FixedKl(0.05), AdaptiveKl(0.1, 6.0)):
        with pytest.raises(ValueError, match=f"kl: {kl} is not finite"):
            controller.updated(kl, 64)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="coefficient: -1 is not 0 or more"):
        FixedKl(-1)
    with pytest.raises(ValueError, match="coefficient: 0 is not above 0, or it could never rise"):
        AdaptiveKl(0, 6.0)
    with pytest.raises(ValueError, match="target: 0 is not above 0"):
        AdaptiveKl(0.1, 0)
    with pytest.raises(ValueError, match="kind: 'pid' is neither"):
        controller_from_state({"kind": "pid"})
