"""A base held in 8 or 4 bits by bitsandbytes, on this machine's CPU: it answers as before, and adapters learn on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.data.batches import Batch
from finetune_trainers.models import load_model, prepare_model
from finetune_trainers.tuning import TunedModel, apply_tuning
from tests.trainers.needs import NEEDS_BITSANDBYTES
from tests.trainers.tiny import VOCABULARY, packed_inputs, plan_for, tiny_model

pytestmark = NEEDS_BITSANDBYTES

CPU = torch.device("cpu")
KINDS = [(bits, precision) for bits in ("int8", "nf4") for precision in ("fp32", "bf16")]

WHOLE_BLOCKS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


def quantized(folder: Path, bits: str, precision: str) -> TunedModel:
    changes: dict[str, Any] = {
        "tuning": {"lora": {"quantization": bits, "targetModules": ["all-linear"]}},
        "training.precision": precision,
    }
    plan = plan_for(folder, changes)
    prepared = prepare_model(plan, folder.parent / "cache", lambda _percent, _text: None)
    return apply_tuning(load_model(prepared, plan, CPU), plan)


def a_batch() -> Batch:
    inputs = packed_inputs([20, 30])
    labels = inputs["input_ids"].roll(-1)
    labels[0, [19, 49]] = -100
    return Batch(
        input_ids=inputs["input_ids"],
        labels=labels,
        position_ids=inputs["position_ids"],
        cu_seqlens=inputs["cu_seq_lens_q"],
        max_seqlen=30,
        num_trained_tokens=48,
    )


def loss_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.input_ids, **forward_kwargs(batch)).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, batch.labels[batch.labels != -100])


@pytest.mark.parametrize(("bits", "precision"), KINDS)
def test_only_the_base_is_quantized_and_its_logits_stay_close(tmp_path: Path, bits: str, precision: str) -> None:
    base = tiny_model(tmp_path / "model", **WHOLE_BLOCKS)
    tuned = quantized(tmp_path / "model", bits, precision)
    weight = tuned.model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    assert weight.dtype in (torch.int8, torch.uint8)
    embeddings = tuned.model.get_parameter("base_model.model.model.embed_tokens.weight")
    assert embeddings.dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]

    ids = packed_inputs([12])["input_ids"]
    with torch.no_grad():
        exact, rough = base(ids).logits, tuned.model.eval()(ids).logits.float()
    assert rough.shape == (1, 12, VOCABULARY)
    error = (rough - exact).norm() / exact.norm()
    assert error < {"int8": 0.1, "nf4": 0.4}[bits]


@pytest.mark.parametrize(("bits", "precision"), KINDS)
def test_adapters_learn_and_the_base_stays_as_it_is(tmp_path: Path, bits: str, precision: str) -> None:
    tiny_model(tmp_path / "model", **WHOLE_BLOCKS)
    tuned = quantized(tmp_path / "model", bits, precision)
    batch = a_batch()
    frozen = {name: p.clone() for name, p in tuned.model.named_parameters() if name not in tuned.trainable}
    optimizer = torch.optim.AdamW([tuned.model.get_parameter(name) for name in tuned.trainable], lr=0.01)
    losses = []
    for _ in range(8):
        loss = loss_of(tuned.model, batch)
        losses.append(float(loss.detach()))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():  # as an evaluation in between does
        loss_of(tuned.model.eval(), batch)
    assert all(torch.equal(tuned.model.get_parameter(name), before) for name, before in frozen.items())
