"""How many tokens have room, by numbers of models that everybody knows."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, Qwen2Config

from finetune_trainers.rollout.room import tokens_that_fit

GIB = 1 << 30
SEVEN: dict[str, Any] = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
"""Half a MiB a token in 16 bits: a GiB for 2048."""


@pytest.mark.parametrize(
    ("config", "item_bytes", "rows"),
    [
        pytest.param(LlamaConfig(**SEVEN), 2, 20, id="a GiB a row"),
        pytest.param(LlamaConfig(**SEVEN), 4, 10, id="in fp32 half as many"),
        pytest.param(Qwen2Config(**SEVEN, num_key_value_heads=8), 2, 80, id="a quarter of the heads have keys"),
        pytest.param(LlamaConfig(**SEVEN, head_dim=256), 2, 10, id="heads wider than their share"),
        pytest.param(GPT2Config(n_layer=32, n_embd=4096, n_head=32), 2, 20, id="names of its own"),
    ],
)
def test_as_many_rows_have_room_as_a_quarter_of_80_gib_holds(config: Any, item_bytes: int, rows: int) -> None:
    assert tokens_that_fit(config, item_bytes, 80 * GIB) == rows * 2048


def test_a_model_without_keys_that_grow_has_no_bound() -> None:
    assert tokens_that_fit(MambaConfig(), 2, GIB) is None
