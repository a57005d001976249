"""How many tokens have room, by numbers of models that everybody knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig, Qwen2Config

from finetune_trainers.rollout import room
from finetune_trainers.rollout.room import memory_of, tokens_that_fit

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


@pytest.mark.parametrize(("limit", "whole"), [("max", None), (str(GIB), GIB), (str(1 << 60), None), (None, None)])
def test_workers_of_a_machine_share_what_it_has_or_what_its_container_may_take(
    limit: str | None, whole: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`None`: no container, and all that the machine has."""

    def memory(num_workers: int) -> float:
        return memory_of(cast(Any, SimpleNamespace(device=torch.device("cpu"), local_world_size=num_workers)))

    monkeypatch.setattr(room, "_CGROUP_LIMIT", tmp_path / "memory.max")
    of_machine = memory(1)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert memory(1) == (of_machine if whole is None else whole)
    assert memory(4) == memory(1) / 4
