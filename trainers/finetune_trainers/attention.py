"""Attention for documents laid end to end in one row: exact, without padding and without a T × T mask.

Registered with transformers under the name `finetune_packed`; `models.load_model` selects it. The loop calls

    model(input_ids=batch.input_ids, **forward_kwargs(batch))

and each token sees only earlier tokens of its own document. A forward without document boundaries (`generate`, a
padded batch) goes through transformers' scaled dot product attention with its usual mask.

Shapes: T tokens of the row, D documents, H query heads, K key/value heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune_trainers.cpu_bf16 import bf16_is_emulated

__all__ = ["PACKED_ATTENTION", "DeferredMask", "forward_kwargs", "packed_attention"]

PACKED_ATTENTION = "finetune_packed"


def forward_kwargs(batch: Any) -> dict[str, Any]:
    """The keyword arguments of a causal model's forward for a `data.batches.Batch`, input_ids left out.

    `logits_to_keep` selects the positions that are trained on, so that only they reach the output head:
    the logits are [1, number of trained tokens, vocabulary], in the order of `labels[labels != -100]`.
    """
    return {
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "logits_to_keep": (batch.labels[0] != -100).nonzero().squeeze(1),
        "use_cache": False,
    }


@dataclass(frozen=True)
class DeferredMask:
    """A mask that is built when an attention layer turns out to need it.

    Models make their mask before any layer runs and without knowing of document boundaries; with boundaries the
    mask is never looked at, and building it would cost T × T.
    """

    build: Callable[[], Tensor | None]


def _deferred_mask(**kwargs: Any) -> DeferredMask:
    built: list[Tensor | None] = []

    def build() -> Tensor | None:
        if not built:
            built.append(sdpa_mask(**kwargs))
        return built[0]

    return DeferredMask(build)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, C], key and value [B, K, T, C] -> ([B, T, H, C], None).

    With `cu_seq_lens_q` [D + 1] B is 1 and documents are attended one by one. `softcap` (capped scores) and
    `s_aux` (attention sinks [H]) are those of models that have them.
    """
    how = _Scores(dropout, scaling, sliding_window, softcap, s_aux)
    device = query.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query.dtype
    computed = torch.float32 if dtype is torch.bfloat16 and bf16_is_emulated(device) else dtype
    query, key, value = (states.to(dtype).to(computed) for states in (query, key, value))
    with torch.autocast(device.type, enabled=False):
        if cu_seq_lens_q is None:
            mask = attention_mask.build() if isinstance(attention_mask, DeferredMask) else attention_mask
            output = _masked(module, query, key, value, mask, how, kwargs)
        elif how.fits_varlen(query):
            assert max_length_q is not None
            output = _varlen(query, key, value, cu_seq_lens_q, max_length_q, how)
        else:
            output = _documents(query, key, value, cu_seq_lens_q, how)
    return output.to(dtype), None


@dataclass(frozen=True)
class _Scores:
    """How a layer makes weights of its scores."""

    dropout: float
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    s_aux: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.s_aux is None

    def fits_varlen(self, query: Tensor) -> bool:
        halves = query.dtype in (torch.bfloat16, torch.float16)
        return self.plain and self.dropout == 0.0 and query.is_cuda and halves


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    how: _Scores,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention without document boundaries: -> [B, T, H, C]."""
    if how.plain:
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, how.dropout, how.scaling, **kwargs)[0]
        return output
    if mask is None:
        mask = _causal(query.shape[2], key.shape[2], how.sliding_window, query.device)
    return _explicit(query, key, value, mask, how).transpose(1, 2).contiguous()


def _documents(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, how: _Scores) -> Tensor:
    """Attention inside each document, one after the other: -> [1, T, H, C]."""
    lengths: list[int] = boundaries.diff().tolist()
    # split, not slices: its backward is one concatenation, where each slice's fills a whole row with zeros
    queries, keys, values = (torch.split(states, lengths, dim=2) for states in (query, key, value))
    outputs = [_one_document(*part, how=how).transpose(1, 2) for part in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def _one_document(query: Tensor, key: Tensor, value: Tensor, how: _Scores) -> Tensor:
    """[1, H, L, C] and [1, K, L, C] -> [1, H, L, C]."""
    length = query.shape[2]
    windowed = how.sliding_window is not None and length > how.sliding_window
    if not how.plain:
        return _explicit(query, key, value, _causal(length, length, how.sliding_window, query.device), how)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        _causal(length, length, how.sliding_window, query.device) if windowed else None,
        how.dropout,
        is_causal=not windowed,
        scale=how.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _causal(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which key each query may see: [1, 1, queries, keys], the last query standing at the last key."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    seen = key <= query
    if sliding_window is not None:
        seen &= key > query - sliding_window
    return seen[None, None]


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: _Scores) -> Tensor:
    """Attention step by step, for capped scores and sinks, which the fused kernels do not know: -> [B, H, T, C].

    `mask` [B or 1, 1, T, keys] is True where a query sees a key.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
    scores = query @ key.transpose(2, 3) * scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    if how.s_aux is not None:  # one more score per head, which takes probability and gives nothing
        sinks = how.s_aux.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, how.dropout) @ value


def _varlen(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, how: _Scores) -> Tensor:
    """All documents in one flash kernel on a CUDA device: -> [1, T, H, C]."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query.transpose(1, 2)[0],  # [T, H, C]
        key.transpose(1, 2)[0],
        value.transpose(1, 2)[0],
        boundaries,
        boundaries,
        longest,
        longest,
        scale=how.scaling,
        window_size=(-1 if how.sliding_window is None else how.sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _deferred_mask)
