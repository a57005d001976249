"""From losses per token to one number: three ways by hand."""

from __future__ import annotations

import pytest
import torch

from finetune_trainers.rl.aggregation import Aggregation, counts_tokens, token_weights

LOSSES = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [
        pytest.param("token", 2.5, id="10 over 4 tokens"),
        pytest.param("sequence", 3.0, id="means of 2 and 4"),
        pytest.param("constant", 1.0, id="10 over 2 times 5"),
    ],
)
def test_a_long_and_a_short_response(aggregation: Aggregation, wanted: float) -> None:
    weights = token_weights(torch.tensor([3, 1]), aggregation, max_length=5)
    total = sum(float(weight * losses.sum()) for weight, losses in zip(weights, LOSSES, strict=True))
    assert total / (4 if counts_tokens(aggregation) else 2) == pytest.approx(wanted)


def test_a_response_without_a_token_has_a_finite_weight() -> None:
    assert token_weights(torch.tensor([0]), "sequence", max_length=5).isfinite().all()
