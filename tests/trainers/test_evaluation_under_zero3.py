"""Two gloo ranks with a real ZeRO-3 engine give the figures and answers of one process with the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_trainers.attention import PACKED_ATTENTION
from tests.trainers.two_ranks import run_two_ranks
from tests.trainers.zero3_worker import figures

pytestmark = pytest.mark.training


def save_model(folder: Path) -> Any:
    torch.manual_seed(7)
    config: Any = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=1,
    )
    config._attn_implementation = PACKED_ATTENTION
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    wrapped.save_pretrained(folder)
    return wrapped


class Alone:
    rank, world_size, device = 0, 1, torch.device("cpu")

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


def test_two_ranks_with_split_parameters_agree_with_one_process(tmp_path: Path) -> None:
    model, tokenizer = save_model(tmp_path), save_tokenizer(tmp_path)
    losses, answers, texts = figures(model, tokenizer, Alone())
    assert len({len(text.split()) for text in texts}) > 1, "answers of one length would not show a rank that waits"
    run_two_ranks("tests.trainers.zero3_worker", tmp_path)
    for results in sorted(tmp_path.glob("rank-*.json")):
        their_losses, their_answers, their_texts = json.loads(results.read_text())
        assert their_losses == pytest.approx(losses, rel=1e-4)
        assert their_answers == pytest.approx(answers)
        assert their_texts == texts
