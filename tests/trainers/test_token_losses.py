"""The loss of distillation token by token: exact values, exact gradients, heads of other lengths, and its figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_api.spec import Distill
from finetune_trainers.methods.distill import token_losses
from tests.trainers.reference import divergence
from tests.trainers.rl.largest import Largest

SETTINGS: dict[str, dict[str, Any]] = {
    "forward": {},
    "forward, warm": {"temperature": 3.0},
    "forward, with the data": {"alpha": 0.25},
    "reverse": {"divergence": "reverse-kl"},
    "reverse, cold, with the data": {"divergence": "reverse-kl", "temperature": 0.7, "alpha": 0.9},
    "jsd": {"divergence": "jsd"},
    "jsd, uneven, warm": {"divergence": "jsd", "beta": 0.1, "temperature": 2.0},
    "jsd, uneven, with the data": {"divergence": "jsd", "beta": 0.9, "alpha": 0.5},
}


def distill(**changes: Any) -> Distill:
    return Distill.model_validate({"teacher": {"source": "hf://org/teacher"}, **changes})


def plain(student: Tensor, teacher: Tensor, labels: Tensor, settings: Distill) -> Tensor:
    """[K], with torch's own functions and whole softmaxes."""
    of_data = F.cross_entropy(student, labels, reduction="none")
    distance = divergence(student, teacher, settings)
    return (1 - settings.alpha) * settings.temperature**2 * distance + settings.alpha * of_data


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("way", SETTINGS)
def test_values_and_gradients_are_those_of_torch(way: str, chunk: int) -> None:
    torch.manual_seed(0)
    settings = distill(**SETTINGS[way])
    student, teacher, labels, weights = torch.randn(7, 11), torch.randn(7, 11), torch.randint(11, (7,)), torch.randn(7)
    ours, theirs = (student.clone().requires_grad_(True) for _ in range(2))
    found, _ = token_losses(ours * 1.0, teacher, labels, settings, chunk_elements=11 * chunk)
    wanted = plain(theirs, teacher, labels, settings)
    assert torch.allclose(found, wanted, atol=1e-5)
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    (wanted * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_two_who_agree_are_at_no_distance_and_have_no_gradient(kind: str) -> None:
    logits = torch.randn(5, 11)
    leaf = logits.clone().requires_grad_(True)
    found, sums = token_losses(leaf * 1.0, logits, torch.zeros(5, dtype=torch.int64), distill(divergence=kind))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert found.abs().max().item() == pytest.approx(0, abs=1e-6)
    assert leaf.grad.abs().max().item() == pytest.approx(0, abs=1e-6)
    assert sums[2].item() == 5


@pytest.mark.parametrize(("longer", "shorter"), [("student", "teacher"), ("teacher", "student")])
def test_padding_of_either_head_is_not_compared(longer: str, shorter: str) -> None:
    """Only the data's own cross-entropy knows the student's padding, as it does without a teacher."""
    torch.manual_seed(0)
    both = {"student": torch.randn(6, 9), "teacher": torch.randn(6, 9)}
    labels = torch.randint(9, (6,))
    wanted, _ = token_losses(both["student"], both["teacher"], labels, distill())
    both[longer] = torch.cat([both[longer], torch.full((6, 4), 2.0)], dim=1)
    leaf = both["student"].clone().requires_grad_(True)
    found, _ = token_losses(leaf * 1.0, both["teacher"], labels, distill())
    torch.testing.assert_close(found, wanted)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert not leaf.grad[:, 9:].any()
    with_data, _ = token_losses(both["student"], both["teacher"], labels, distill(alpha=0.5))
    of_data = F.cross_entropy(both["student"], labels, reduction="none")
    torch.testing.assert_close(with_data, 0.5 * wanted + 0.5 * of_data)


@pytest.mark.parametrize("settings", [distill(), distill(divergence="reverse-kl", temperature=4.0)])
def test_the_figures_are_sums_at_temperature_one_whatever_the_loss_is(settings: Distill) -> None:
    """The student thinks both words alike, the teacher one of them three times as likely; the data says the other."""
    student = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    teacher = torch.tensor([[math.log(3), 0.0], [5.0, 0.0]])
    _, sums = token_losses(student, teacher, torch.tensor([1, 0]), settings)
    kl, cross_entropy, agreement, accuracy, count = sums.tolist()
    assert kl == pytest.approx(0.1308120, abs=1e-6)
    assert cross_entropy == pytest.approx(math.log(2) + math.log(1 + math.exp(-5)), abs=1e-6)
    assert (agreement, accuracy, count) == (2, 1, 2)


def test_nothing_trained_is_a_loss_of_nothing_that_still_has_a_gradient() -> None:
    leaf = torch.randn(0, 11, requires_grad=True)
    found, sums = token_losses(leaf * 1.0, torch.randn(0, 11), torch.zeros(0, dtype=torch.int64), distill(alpha=0.5))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert not sums.any()


def test_in_bf16_no_tensor_of_all_logits_is_made_in_fp32() -> None:
    torch.manual_seed(0)
    leaf = torch.randn(64, 100, dtype=torch.bfloat16, requires_grad=True)
    teacher, labels = torch.randn(64, 100, dtype=torch.bfloat16), torch.randint(100, (64,))
    with Largest(torch.float32) as largest:
        found, _ = token_losses(leaf * 1.0, teacher, labels, distill(divergence="jsd", alpha=0.5), chunk_elements=400)
        found.sum().backward()  # type: ignore[no-untyped-call]
    assert 0 < largest.elements <= 400
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
