"""Divergences between student and teacher, by hand and for any logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainers.rl.distillation import divergence
from tests.trainers.rl.largest import Largest

# The student thinks both words alike; to the teacher one is three times as likely.
STUDENT, TEACHER = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
SEEDS = st.integers(0, 1000)


def pair(seed: int) -> tuple[Tensor, Tensor]:
    """Logits [7, 5] of a student and a teacher."""
    student, teacher = 3 * torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student, teacher


@pytest.mark.parametrize(
    ("beta", "wanted"),
    [
        pytest.param(0.0, 0.1308120, id="forward: ¼ log ½ + ¾ log 3/2"),
        pytest.param(1.0, 0.1438410, id="reverse: ½ log 2 + ½ log 2/3"),
        pytest.param(0.5, 0.0338221, id="Jensen-Shannon, to a mixture of 3/8 and 5/8"),
    ],
)
def test_a_fair_student_and_a_teacher_with_an_opinion(beta: float, wanted: float) -> None:
    assert divergence(STUDENT, TEACHER, beta=beta).item() == pytest.approx(wanted, abs=1e-6)


def test_half_the_temperature_makes_the_teacher_nine_to_one() -> None:
    found = divergence(STUDENT, TEACHER, beta=1.0, temperature=0.5)
    assert found.item() == pytest.approx(0.5 * math.log(5) + 0.5 * math.log(5 / 9))


@settings(max_examples=50)
@given(SEEDS)
def test_at_one_half_both_may_change_places(seed: int) -> None:
    student, teacher = pair(seed)
    torch.testing.assert_close(divergence(student, teacher, beta=0.5), divergence(teacher, student, beta=0.5))


@settings(max_examples=50)
@given(SEEDS, st.floats(0, 1))
def test_it_is_never_negative_and_nothing_between_equals(seed: int, beta: float) -> None:
    student, teacher = pair(seed)
    assert (divergence(student, teacher, beta=beta) >= -1e-12).all()
    assert divergence(student, student, beta=beta).abs().max().item() == pytest.approx(0, abs=1e-12)


@settings(max_examples=50)
@given(SEEDS, st.floats(0.1, 0.9))
def test_jensen_shannon_is_at_most_the_entropy_of_the_mixture_s_weights(seed: int, beta: float) -> None:
    most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert divergence(*pair(seed), beta=beta).max().item() <= most


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 70), st.sampled_from([0.0, 0.3, 1.0]))
def test_the_size_of_the_pieces_does_not_matter(seed: int, chunk_elements: int, beta: float) -> None:
    student, teacher = pair(seed)
    student.requires_grad_()
    whole, parts = (divergence(student, teacher, beta=beta, chunk_elements=size) for size in (1000, chunk_elements))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(found.sum(), student)[0] for found in (parts, whole)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_small_differences(beta: float) -> None:
    student, teacher = pair(1)
    assert torch.autograd.gradcheck(
        lambda given: divergence(given, teacher, beta=beta, temperature=2.0, chunk_elements=15),
        (student.requires_grad_(),),
    )


def test_sixteen_bit_logits_are_never_widened_all_at_once() -> None:
    student, teacher = (logits.bfloat16() for logits in pair(1))
    student.requires_grad_()
    with Largest(torch.float32) as largest:
        divergence(student, teacher, beta=0.3, chunk_elements=2 * 5).sum().backward()  # type: ignore[no-untyped-call]
    assert largest.elements == 2 * 5
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def test_the_teacher_learns_nothing() -> None:
    student, teacher = pair(1)
    teacher.requires_grad_()
    assert not divergence(student, teacher, beta=0.5).requires_grad


def test_dimensions_before_the_last_are_kept_and_none_is_fine() -> None:
    student, teacher = (logits[:6].view(2, 3, 5) for logits in pair(1))
    assert divergence(student, teacher, beta=0.5).shape == (2, 3)
    assert divergence(student[:0], teacher[:0], beta=0.5).shape == (0, 3)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of student \[1, 2\] and teacher \[1, 3\] cannot be compared"):
        divergence(STUDENT, torch.zeros(1, 3), beta=0.5)
    with pytest.raises(ValueError, match=r"beta: 1.5 is not from 0 to 1"):
        divergence(STUDENT, TEACHER, beta=1.5)
    with pytest.raises(ValueError, match="temperature: 0 is not above 0"):
        divergence(STUDENT, TEACHER, beta=0.5, temperature=0)
