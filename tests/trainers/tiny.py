"""Small models on disk, made in the test: real architectures with random weights, and a real tokenizer.

tiny_model(folder)                                   a Llama of two layers with grouped queries and tied embeddings
tiny_model(folder, tie_word_embeddings=False)        any field of its configuration
tiny_model(folder, architecture="Gemma2")            another architecture
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from tests.factories import job

__all__ = ["CHATML", "VOCABULARY", "packed_inputs", "plan_for", "tiny_model", "tiny_tokenizer"]

VOCABULARY = 320
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level tokens without merges: any text goes in, and comes out again."""
    special = ["<pad>", "<|im_end|>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(
    folder: Path,
    architecture: str = "Llama",
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "5GB",
    **config: Any,
) -> PreTrainedModel:
    """Write a model folder with tokenizer, and return the model as it is in memory."""
    settings = getattr(transformers, f"{architecture}Config")(**(_SMALL | config))
    torch.manual_seed(7)
    kind = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    model: PreTrainedModel = getattr(transformers, architecture + kind)(settings)
    nn.Module.to(model, dtype)
    with torch.no_grad():  # the initial weights are so small that every logit looks alike
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.dim() > 1 else parameter.add_(0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    model.eval()
    return model


def plan_for(folder: Path, changes: dict[str, Any] | None = None) -> RunPlan:
    """The plan of a job on the model in `folder`; `changes` by dotted path below spec."""
    defaults = {
        "model": {"source": f"file://{folder}"},
        **({} if "method" in (changes or {}) else {"method.sft.maxSeqLength": 64}),
        "training.learningRate": 0.001,
        "training.precision": "fp32",
    }
    return plan_run(job(defaults | (changes or {})))


def packed_inputs(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """Random documents of these lengths laid end to end, as keyword arguments of a model's forward."""
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }
