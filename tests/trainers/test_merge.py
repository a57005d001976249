"""Merged adapters: the model that PEFT's merge gives, made without building one."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.spec import Precision
from finetune_trainers.errors import UserError
from finetune_trainers.lean_peft import peft
from finetune_trainers.merge import merge_adapter
from tests.trainers.foreign_warnings import PEFT_ASKS_TRANSFORMERS
from tests.trainers.test_artifact import PROBE, Trained, trained
from tests.trainers.tiny import CHATML, tiny_model

pytestmark = PEFT_ASKS_TRANSFORMERS


def adapter(tmp_path: Path, changes: dict[str, Any] | None = None, **model: Any) -> Trained:
    """A trained adapter at tmp_path/adapter on the base at tmp_path/model."""
    tiny_model(tmp_path / "model", **model)
    run = trained(tmp_path / "model", changes)
    run.write(tmp_path / "adapter")
    return run


def logits_of(model: nn.Module, ids: Tensor = PROBE) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()  # type: ignore[no-any-return]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "queries and values": ({}, {}),
    "all linear layers": ({"tuning": {"lora": {"targetModules": ["all-linear"], "alpha": 7, "rank": 3}}}, {}),
    "an output head of its own": (
        {"tuning": {"lora": {"targetModules": ["lm_head"]}}},
        {"tie_word_embeddings": False},
    ),
    "a base in many shards": ({}, {"max_shard_size": "30KB"}),
    "GPT-2, which keeps weights the other way round": (
        {"tuning": {"lora": {"targetModules": ["c_attn"]}}},
        {"architecture": "GPT2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_the_one_that_peft_makes(tmp_path: Path, case: str) -> None:
    changes, model = CASES[case]
    run = adapter(tmp_path, changes, **model)
    artifact = merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", Precision.FP32)
    assert artifact.kind == "model"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    by_peft = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    expected = dict(by_peft.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    torch.testing.assert_close(logits_of(merged), run.logits(PROBE), atol=1e-4, rtol=1e-4)


def test_a_bf16_model_is_the_fp32_one_rounded_once(tmp_path: Path) -> None:
    adapter(tmp_path)
    merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "fp32", Precision.FP32)
    merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "bf16", Precision.BF16)
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    rounded = load_file(tmp_path / "bf16" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype is torch.bfloat16


def test_tokenizer_card_and_the_base_come_along(tmp_path: Path) -> None:
    run = adapter(tmp_path)
    merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", Precision.FP32)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
    assert (tmp_path / "out" / "README.md").read_bytes() == (tmp_path / "adapter" / "README.md").read_bytes()
    assert json.loads((tmp_path / "out" / "digests.json").read_text())["base"]["digest"] == run.prepared.digest
    assert not list((tmp_path / "out").glob("adapter*"))


def test_an_adapter_from_elsewhere_is_merged_without_its_digest(tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / "adapter" / "digests.json").unlink()
    merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", Precision.FP32)
    base = json.loads((tmp_path / "out" / "digests.json").read_text())["base"]
    assert base["source"] == str(tmp_path / "model")


def test_memory_is_that_of_a_few_blocks_whatever_the_size(tmp_path: Path) -> None:
    """The base's one weight has 160 MB in fp32, and merging takes less than half of that."""
    for folder in ("model", "adapter"):
        (tmp_path / folder).mkdir()
    base = {"layer.weight": torch.zeros(20_000, 2_000, dtype=torch.bfloat16)}
    save_file(base, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    name = "base_model.model.layer.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(4, 2_000), f"{name}B.weight": torch.ones(20_000, 4)},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    tracemalloc.start()
    try:
        merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", Precision.BF16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80_000_000
    merged = load_file(tmp_path / "out" / "model.safetensors")["layer.weight"]
    assert merged.eq(8).all()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_base(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})


def halve(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "lora_A" in name}, path)


def rename(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): value for name, value in load_file(path).items()}, path)


def occupy(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "file").touch()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the base has changed": (other_base, "is not the base of this adapter"),
    "the base has no weights": (lambda f: (f / "model/model.safetensors").unlink(), "holds no safetensors weights"),
    "there is no adapter": (lambda f: (f / "adapter/adapter_config.json").unlink(), "has no adapter_config.json"),
    "the adapter has no weights": (
        lambda f: (f / "adapter/adapter_model.safetensors").unlink(),
        "has no adapter_model.safetensors",
    ),
    "it is not LoRA": (lambda f: edit_config(f, peft_type="IA3"), "only plain LoRA is merged here"),
    "it is DoRA": (lambda f: edit_config(f, use_dora=True), "with use_dora"),
    "half of each pair is gone": (halve, "without its lora_B"),
    "it adapts what the base does not have": (rename, "which the model in"),
    "something is there already": (occupy, "holds something already"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_merging_is_refused_when(tmp_path: Path, name: str) -> None:
    adapter(tmp_path)
    spoil, says = FAULTS[name]
    spoil(tmp_path)
    with pytest.raises(UserError, match=says):
        merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", Precision.FP32)
    assert not (tmp_path / "out" / "config.json").exists()
