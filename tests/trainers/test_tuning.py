"""Which parameters learn under each kind of tuning, and with what new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune_trainers.cpu_bf16 import Float32ProductLinear, bf16_is_emulated
from finetune_trainers.models import load_model, prepare_model
from finetune_trainers.tuning import TunedModel, apply_tuning, lora_targets, matching
from tests.trainers.tiny import packed_inputs, plan_for, tiny_model

CPU = torch.device("cpu")


def tuned(folder: Path, changes: dict[str, Any]) -> TunedModel:
    if not folder.exists():
        tiny_model(folder)
    plan = plan_for(folder, changes)
    prepared = prepare_model(plan, folder.parent, lambda _percent, _text: None)
    return apply_tuning(load_model(prepared, plan, CPU), plan)


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_tuning_trains_every_parameter_once(tmp_path: Path) -> None:
    result = tuned(tmp_path / "model", {"tuning": {"full": {}}})
    assert set(result.trainable) == learning(result.model) == {name for name, _ in result.model.named_parameters()}
    assert "lm_head.weight" not in result.trainable  # tied to the embeddings


def test_lora_trains_adapters_on_queries_and_values_by_default(tmp_path: Path) -> None:
    result = tuned(tmp_path / "model", {"tuning": {"lora": {}}})
    assert (
        set(result.trainable)
        == learning(result.model)
        == {
            f"base_model.model.model.layers.{layer}.self_attn.{target}.lora_{side}.default.weight"
            for layer in range(2)
            for target in ("q_proj", "v_proj")
            for side in "AB"
        }
    )


def test_a_new_adapter_changes_no_logit(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model")
    result = tuned(tmp_path / "model", {"tuning": {"lora": {"targetModules": ["all-linear"]}}})
    inputs = packed_inputs([5, 9])
    alone = torch.cat([base(part).logits for part in inputs["input_ids"].split([5, 9], dim=1)], dim=1)
    torch.testing.assert_close(result.model(**inputs).logits, alone, atol=1e-5, rtol=1e-5)


TARGETS: dict[str, tuple[list[str], set[str]]] = {
    "all-linear is all but the output head": (
        ["all-linear"],
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "a wildcard stands for the last part of a name": (
        ["*_proj"],
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "a name may have several parts": (["mlp.up_proj"], {"up_proj"}),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets(tmp_path: Path, case: str) -> None:
    patterns, kinds = TARGETS[case]
    found = {name for names in lora_targets(tiny_model(tmp_path), patterns).values() for name in names}
    assert {name.rpartition(".")[2] for name in found} == kinds
    assert len(found) == 2 * len(kinds)


def test_a_path_with_wildcards_chooses_layers(tmp_path: Path) -> None:
    result = tuned(tmp_path / "model", {"tuning": {"lora": {"targetModules": ["model.layers.1.*.q_proj"]}}})
    assert {name.partition(".lora_")[0] for name in result.trainable} == {
        "base_model.model.model.layers.1.self_attn.q_proj"
    }


def test_adapters_start_the_same_on_every_rank_and_differ_by_seed(tmp_path: Path) -> None:
    def start(seed: int, rank_noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(rank_noise)
        before = torch.get_rng_state()
        model = tuned(tmp_path / "model", {"training.seed": seed}).model
        torch.manual_seed(rank_noise)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}

    first, second, other = start(1, 10), start(1, 20), start(2, 10)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_making_adapters_leaves_the_random_state_alone(tmp_path: Path) -> None:
    plan = plan_for(tmp_path / "model")
    tiny_model(tmp_path / "model")
    model = load_model(prepare_model(plan, tmp_path, lambda *_: None), plan, CPU)
    before = torch.get_rng_state()
    apply_tuning(model, plan)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_torch_engine_gets_fp32_adapters_and_deepspeed_bf16_ones(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    for stage, dtype in {0: torch.float32, 1: torch.bfloat16}.items():
        changes = {"training.precision": "bf16", "deepspeed.zeroStage": stage}
        model = tuned(tmp_path / "model", changes).model
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.hardware
@pytest.mark.skipif(not bf16_is_emulated(CPU), reason="this CPU has bf16 instructions")
def test_adapters_share_the_quick_bf16_products_of_the_base(tmp_path: Path) -> None:
    model = tuned(tmp_path / "model", {"training.precision": "bf16", "deepspeed.zeroStage": 1}).model
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == []
    assert any(isinstance(module, Float32ProductLinear) and "lora_A" in name for name, module in model.named_modules())


def test_gpt2_keeps_its_weights_the_other_way_round_and_is_adapted_too(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "model", "GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=256)
    result = tuned(tmp_path / "model", {"tuning": {"lora": {"targetModules": ["c_attn"]}}})
    for name, parameter in result.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ids = packed_inputs([9])["input_ids"]
    assert not torch.allclose(result.model(ids).logits, base(ids).logits, atol=1e-3)


def test_freezing_trains_what_matches_and_keeps_the_rest(tmp_path: Path) -> None:
    result = tuned(tmp_path / "model", {"tuning": {"freeze": {"train": ["model.layers.1.*", "model.norm.weight"]}}})
    assert result.unfreeze is None
    assert set(result.trainable) == learning(result.model)
    assert {name.split(".")[1] for name in result.trainable} == {"layers", "norm"}
    assert not any("layers.0" in name for name in result.trainable)


def test_a_tied_parameter_is_found_by_either_of_its_names(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    assert matching(model, ["lm_head.*"]) == matching(model, ["model.embed*"]) == ["model.embed_tokens.weight"]


def test_unfreezing_steps_come_in_order_and_name_each_parameter_once(tmp_path: Path) -> None:
    steps = [{"at": 0.7, "layers": ["model.*"]}, {"at": 0.3, "layers": ["model.layers.*"]}]
    freeze = {"train": ["model.layers.1.*"], "unfreeze": steps}
    result = tuned(tmp_path / "model", {"tuning": {"freeze": freeze}})
    assert result.unfreeze is not None
    (first_at, first), (second_at, second) = result.unfreeze.groups
    assert (first_at, second_at) == (0.3, 0.7)
    assert all(name.startswith("model.layers.0.") for name in first)
    assert set(second) == {"model.embed_tokens.weight", "model.norm.weight"}
    start = set(result.trainable) - set(first) - set(second)
    assert all(name.startswith("model.layers.1.") for name in start)
    assert learning(result.model) == set(
        result.trainable
    )  # an optimizer is made for all; the engine closes the later ones
