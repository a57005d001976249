"""Log-probabilities and entropy of chosen tokens, without a float32 copy of all logits. Called by rollouts and losses.

    N  positions      H  width of the model      V  words of the vocabulary

A response of 1,000 tokens over 150,000 words is 600 MB of float32 logits a sequence, and a softmax holds three of them.
Both functions work on a few rows at a time, forwards and backwards. The gradient is exact: with z the logits divided by
the temperature, p = softmax(z), E the entropy and y the chosen token,

    d log p_y / d z_j = [j = y] - p_j            d E / d z_j = -p_j (log p_j + E)

Arithmetic is float32, or float64 for float64 inputs. Logits must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune_trainers.cpu_fp32 import linear

__all__ = ["TokenStats", "stats_from_hidden", "stats_from_logits"]

CHUNK_ELEMENTS = 1 << 22
"""Logits taken to float32 at a time: 16 MB."""


class TokenStats(NamedTuple):
    """What a policy says of the tokens that were chosen."""

    log_probs: Tensor
    """log p(token), nats, of the shape of the tokens."""
    entropy: Tensor
    """-sum_v p(v) log p(v), nats, of the same shape."""


def stats_from_logits(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, chunk_elements: int = CHUNK_ELEMENTS
) -> TokenStats:
    """Log-probabilities and entropy of `tokens` [...] under softmax(logits / temperature). logits [..., V] are kept.

    ValueError: shapes that do not match, a temperature that is not positive.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {list(logits.shape)} do not belong to tokens {list(tokens.shape)}")
    rows = logits.reshape(-1, logits.shape[-1])
    found: tuple[Tensor, Tensor] = _FromLogits.apply(  # type: ignore[no-untyped-call]
        rows, tokens.reshape(-1), _inverse(temperature), _rows(rows.shape[-1], chunk_elements)
    )
    return TokenStats(found[0].view(tokens.shape), found[1].view(tokens.shape))


def stats_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenStats:
    """The same from what enters the output head, so that the logits [N, V] never exist at once.

    hidden [..., H], weight [V, H], bias [V], tokens [...]. Logits are made a second time for the gradient; that of the
    head is summed over chunks in float32 whatever the type of the weights. ValueError as above.
    """
    if hidden.shape[:-1] != tokens.shape or hidden.shape[-1] != weight.shape[-1]:
        shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, tokens {list(tokens.shape)}"
        raise ValueError(f"{shapes} do not belong together")
    rows = hidden.reshape(-1, hidden.shape[-1])
    found: tuple[Tensor, Tensor] = _FromHidden.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, tokens.reshape(-1), _inverse(temperature), _rows(weight.shape[0], chunk_elements)
    )
    return TokenStats(found[0].view(tokens.shape), found[1].view(tokens.shape))


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, scale: float, rows: int) -> tuple[Tensor, Tensor]:
        log_probs, entropy = _empty(logits, tokens), _empty(logits, tokens)
        for part in _parts(tokens.numel(), rows):
            log_probs[part], entropy[part] = _stats(_wide(logits[part]) * scale, tokens[part])
        ctx.save_for_backward(logits, tokens)
        ctx.scale, ctx.rows = scale, rows
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, tokens = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for part in _parts(tokens.numel(), ctx.rows):
            grad = _grad(_wide(logits[part]) * ctx.scale, tokens[part], grads[0][part], grads[1][part])
            grad_logits[part] = grad * ctx.scale
        return grad_logits, None, None, None


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, scale: float, rows: int
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropy = _empty(hidden, tokens), _empty(hidden, tokens)
        for part in _parts(tokens.numel(), rows):
            log_probs[part], entropy[part] = _stats(_logits(hidden[part], weight, bias, scale), tokens[part])
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.scale, ctx.rows = scale, rows
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_wide_type(weight)) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=_wide_type(bias)) if wants_bias else None
        for part in _parts(tokens.numel(), ctx.rows):
            logits = _logits(hidden[part], weight, bias, ctx.scale)
            grad = _grad(logits, tokens[part], grads[0][part], grads[1][part]) * ctx.scale
            # The products run in the model's own type, as the output head's do; only sums are wider.
            narrow = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = linear(narrow, weight.t())
            if grad_weight is not None:
                grad_weight += linear(narrow.t(), hidden[part].to(weight.dtype).t())
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[rows, V] of what the head makes of [rows, H], in the wide type and over the temperature."""
    return _wide(linear(hidden.to(weight.dtype), weight, bias)) * scale


def _stats(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of wide logits [rows, V] and tokens [rows]."""
    log_probs = torch.log_softmax(logits, dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(1, tokens[:, None])[:, 0], entropy


def _grad(logits: Tensor, tokens: Tensor, of_log_probs: Tensor, of_entropy: Tensor) -> Tensor:
    """The gradient [rows, V] of wide logits, given those of the two results [rows]."""
    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1, keepdim=True)
    grad = probs * (-of_log_probs[:, None] - of_entropy[:, None] * (log_probs + entropy))
    return grad.scatter_add_(1, tokens[:, None], of_log_probs[:, None])


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_type(tensor))


def _empty(like: Tensor, tokens: Tensor) -> Tensor:
    return torch.empty(tokens.shape, dtype=_wide_type(like), device=like.device)


def _parts(total: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, total, rows))


def _rows(vocabulary: int, chunk_elements: int) -> int:
    return max(1, chunk_elements // max(vocabulary, 1))


def _inverse(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not above 0")
    return 1 / temperature
