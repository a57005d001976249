"""Attention for documents laid end to end in one row: exact, without padding and without a mask of length squared.

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

    With `cu_seq_lens_q` [D + 1] B is 1 and documents are attended one by one. `softcap` and `s_aux` (attention
    sinks) are those of models that have them.
    """
    if cu_seq_lens_q is None:
        mask = attention_mask.build() if isinstance(attention_mask, DeferredMask) else attention_mask
        if softcap is None and s_aux is None:
            output, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
            return output, None
        if mask is None:
            mask = _causal(query.shape[2], key.shape[2], None, query.device)
        return _explicit(query, key, value, mask, dropout, scaling, softcap, s_aux).transpose(
            1, 2
        ).contiguous(), None
    plain = softcap is None and s_aux is None
    if plain and dropout == 0.0 and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        assert max_length_q is not None
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    emulated = query.dtype is torch.bfloat16 and bf16_is_emulated(query.device)
    states = [tensor.float() if emulated else tensor for tensor in (query, key, value)]
    outputs = [
        _one_document(*document, dropout, scaling, sliding_window, softcap, s_aux).transpose(1, 2)
        # split, not slices: its backward is one concatenation, a slice's fills a whole row with zeros
        for document in zip(*(tensor.split(lengths, dim=2) for tensor in states), strict=True)
    ]
    output = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()
    return output.to(query.dtype), None


def _one_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Causal attention inside one document: [1, H, L, C] and [1, K, L, C] -> [1, H, L, C]."""
    length = query.shape[2]
    windowed = sliding_window is not None and length > sliding_window
    if softcap is None and s_aux is None:
        mask = _causal(length, length, sliding_window, query.device) if windowed else None
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    mask = _causal(length, length, sliding_window, query.device)
    return _explicit(query, key, value, mask, dropout, scaling, softcap, s_aux)


def _causal(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which key each query may see: [1, 1, queries, keys], the last query standing at the last key."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    seen = key <= query
    if sliding_window is not None:
        seen &= key > query - sliding_window
    return seen[None, None]


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Attention step by step, for capped scores and sinks, which the fused kernels do not know."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~seen, float("-inf"))
    if s_aux is not None:  # one more score per head, which takes probability and gives nothing
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout) @ value


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """All documents in one flash kernel on a CUDA device: -> [1, T, H, C]."""
    from torch.nn.attention.varlen import varlen_attn

    rows = [tensor.transpose(1, 2)[0] for tensor in (query, key, value)]  # [T, heads, C]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    output = varlen_attn(
        *rows,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _deferred_mask)
