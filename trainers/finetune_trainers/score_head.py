"""The score of a reward model: one number for each document of a packed row, read where plain transformers reads it.

A reward model is transformers' `...ForSequenceClassification` with one label: the model without its output head, and a
linear layer `score` without bias. transformers reads the score at the last token that is not padding, which is the rule
here too, so a model reloaded elsewhere gives the same scores. Called by `models`, `artifact` and the method `reward`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.data.batches import Batch
from finetune_trainers.tuning import SCORE_HEAD

__all__ = ["HEAD", "begin_head", "has_score_head", "padding_token", "read_packed", "score_settings", "scores"]

HEAD = SCORE_HEAD


def has_score_head(config: Any) -> bool:
    """Whether transformers knows the model with a score in the place of its output head."""
    return type(config) in AutoModelForSequenceClassification._model_mapping


def padding_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that batches of this reward model are padded with.

    One that ends no answer where there is one: padded with the end token, the score would be read before the end.
    """
    candidates = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    found = next((token for token in candidates if token is not None and token != tokenizer.eos_token), None)
    return str(found or tokenizer.pad_token or tokenizer.eos_token)


def score_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a configuration says of the score: one label, and the padding that is not looked at."""
    return {"num_labels": 1, "pad_token_id": tokenizer.convert_tokens_to_ids(padding_token(tokenizer))}


def begin_head(model: PreTrainedModel, seed: int) -> None:
    """New weights for the head, the same on every rank and whatever holds them. Collective under ZeRO-3."""
    weight = model.get_submodule(HEAD).weight
    assert isinstance(weight, nn.Parameter)
    split: Any = nullcontext()
    shape = weight.shape
    if hasattr(weight, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        whole: Any = weight  # DeepSpeed leaves the shape on the parameter, which holds a part
        split, shape = GatheredParameters([weight], modifier_rank=0), whole.ds_shape
    drawn = torch.empty(shape).normal_(std=_spread(model), generator=torch.Generator().manual_seed(seed))
    with split, torch.no_grad():
        if weight.numel() == drawn.numel():
            weight.copy_(drawn)


def _spread(model: PreTrainedModel) -> float:
    return float(getattr(model.config.get_text_config(), "initializer_range", 0.02))


def read_packed(model: PreTrainedModel) -> None:
    """Let `model` be called with `score_positions`: it then returns scores [1, D] of one packed row."""
    plain = model.forward

    def forward(*args: Any, score_positions: Tensor | None = None, **kwargs: Any) -> Any:
        if score_positions is None:
            return plain(*args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if name not in _OF_THE_HEAD and value is not None}
        hidden = model.base_model(*args, **inputs).last_hidden_state[0]  # [T, H]
        return SequenceClassifierOutput(logits=model.get_submodule(HEAD)(hidden[score_positions]).T)

    model.forward = forward


_OF_THE_HEAD = {"labels", "return_dict", "output_attentions", "output_hidden_states"}
"""What PEFT passes on, and what only the plain forward pass knows."""


def scores(module: Callable[..., Any], batch: Batch, padding_id: int) -> Tensor:
    """fp32 [D]: one score for each document of `batch`. `module` reads packed rows."""
    kwargs = forward_kwargs(batch)
    del kwargs["logits_to_keep"]
    places = _last_tokens(batch, padding_id)
    found: Tensor = module(input_ids=batch.input_ids, score_positions=places, **kwargs).logits
    return found[0].float()


def _last_tokens(batch: Batch, padding_id: int) -> Tensor:
    """int64 [D]: in each document the last token that is not padding, or its first one."""
    starts, ends = batch.cu_seqlens[:-1].long(), batch.cu_seqlens[1:].long()
    held = (batch.input_ids[0] != padding_id).nonzero().squeeze(1)
    if held.numel() == 0:
        return starts
    last = held[(torch.searchsorted(held, ends) - 1).clamp(min=0)]
    return torch.maximum(last, starts)
