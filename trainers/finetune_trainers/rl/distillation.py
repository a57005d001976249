"""How far the student's next-token distribution is from the teacher's, per token. Called by logit-level distillation.

    N  positions      V  words of the vocabulary that both share

Both sides' logits are there; the softmaxes of them are not: a few rows at a time are worked on, and made again for the
gradient, which flows to the student alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["divergence"]

CHUNK_ELEMENTS = 1 << 22
"""Logits of either side taken to float32 at a time: 16 MB."""


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Generalised Jensen-Shannon divergence [...] of logits [..., V], nats per position, never negative.

    With student S, teacher T and their mixture M = (1 - beta) S + beta T (Agarwal et al., arXiv 2306.13649):

        0 < beta < 1   beta KL(T || M) + (1 - beta) KL(S || M); at 0.5 both may change places
        beta = 0       KL(T || S), forward: the student covers all that the teacher does (Hinton, arXiv 1503.02531)
        beta = 1       KL(S || T), reverse: the student keeps to what the teacher prefers (Gu, arXiv 2306.08543)

    The ends are the divergences themselves, as in TRL: the limits of the first line are 0.

    Both logits are divided by `temperature`; the gradient then shrinks with its square, which is the caller's to undo.
    Arithmetic is float32, or float64 for float64 logits, which must be finite. ValueError: vocabularies that differ,
    beta outside 0 to 1, a temperature that is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        shapes = f"student {list(student_logits.shape)} and teacher {list(teacher_logits.shape)}"
        raise ValueError(f"logits of {shapes} cannot be compared word by word")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: {beta} is not from 0 to 1")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0")
    vocabulary = student_logits.shape[-1]
    student = student_logits.reshape(-1, vocabulary)
    teacher = teacher_logits.detach().reshape(-1, vocabulary)
    rows = max(1, chunk_elements // max(vocabulary, 1))
    found: Tensor = _Divergence.apply(student, teacher, beta, temperature, rows)  # type: ignore[no-untyped-call]
    return found.view(student_logits.shape[:-1])


class _Divergence(torch.autograd.Function):
    """`_divergence` a few rows at a time; autograd sees one piece of the backward pass at a time as well."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, beta: float, temperature: float, rows: int) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.beta, ctx.temperature, ctx.rows = beta, temperature, rows
        parts = zip(torch.split(student, rows), torch.split(teacher, rows), strict=True)
        return torch.cat([_divergence(one, other, beta, temperature) for one, other in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, teacher = ctx.saved_tensors
        grad_student = torch.empty_like(student)
        pieces = (torch.split(tensor, ctx.rows) for tensor in (student, teacher, grads[0], grad_student))
        for one, other, pull, place in zip(*pieces, strict=True):
            leaf = one.detach().requires_grad_()
            with torch.enable_grad():
                found = _divergence(leaf, other, ctx.beta, ctx.temperature)
            place.copy_(torch.autograd.grad(found, leaf, pull)[0])
        return grad_student, None, None, None, None


def _divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """[rows] of logits [rows, V]."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    student = torch.log_softmax(student.to(wide) / temperature, dim=-1)
    teacher = torch.log_softmax(teacher.to(wide) / temperature, dim=-1)
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(of: Tensor, to: Tensor) -> Tensor:
    """KL(of || to) [rows] from log-probabilities [rows, V]."""
    return (of.exp() * (of - to)).sum(-1)
