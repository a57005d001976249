"""Log-probabilities of answers: each token to its own document."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.methods.log_probs import answers, document_of


class Constant(nn.Module):
    """Every token is equally likely, out of four."""

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: object) -> object:
        class Output:
            logits = torch.zeros(1, len(logits_to_keep), 4, requires_grad=True)

        return Output()


def batch(labels: list[int], bounds: list[int]) -> Batch:
    row = torch.tensor([labels])
    return Batch(row, row, row, torch.tensor(bounds, dtype=torch.int32), 9, sum(label != IGNORED for label in labels))


def test_each_document_gets_the_sum_and_the_mean_of_its_own_tokens() -> None:
    one = batch([IGNORED, 1, 2, IGNORED, 3, IGNORED, IGNORED], [0, 4, 5, 7])
    assert document_of(one).tolist() == [0, 0, 1]
    found = answers(Constant(), one)
    assert found.log_probs.tolist() == pytest.approx([2 * math.log(0.25), math.log(0.25), 0.0])
    assert found.means.tolist() == pytest.approx([math.log(0.25), math.log(0.25), 0.0])


def test_a_batch_without_anything_trained_has_a_gradient_of_nothing() -> None:
    found = answers(Constant(), batch([IGNORED], [0, 1]))
    found.log_probs.sum().backward()  # type: ignore[no-untyped-call]
    assert found.log_probs.tolist() == [0.0]
