"""Packed attention: each document as if it were alone, and no mask that grows with the square of the row."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_trainers import attention
from finetune_trainers.attention import PACKED_ATTENTION, forward_kwargs
from tests.trainers.tiny import packed_inputs, tiny_model

LENGTHS = [7, 1, 19, 4]


def packed_model(folder: Path, architecture: str = "Llama", **config: Any) -> Any:
    tiny_model(folder, architecture, **config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED_ATTENTION)
    return model


def reference_model(folder: Path) -> Any:
    """The same weights with transformers' own eager attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model


def separate_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Each document in a forward pass of its own: [1, T, V]."""
    return torch.cat([model(part).logits for part in torch.split(input_ids, LENGTHS, dim=1)], dim=1)


def gradients(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    model.zero_grad()
    torch.autograd.backward((logits * weights).sum())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, as many key heads as query heads": {"num_key_value_heads": 4},
    "Mistral, a window shorter than a document": {"sliding_window": 5},
    "Qwen3": {"head_dim": 16},
    "Gemma2, capped scores and a window in every other layer": {
        "head_dim": 8,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
    },
    "GptOss, attention sinks": {
        "head_dim": 8,
        "sliding_window": 5,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_packed_logits_and_gradients_are_those_of_each_document_alone(tmp_path: Path, case: str) -> None:
    model = packed_model(tmp_path, case.partition(",")[0], **ARCHITECTURES[case])
    reference = reference_model(tmp_path)
    inputs = packed_inputs(LENGTHS)

    packed = model(**inputs).logits
    separate = separate_logits(reference, inputs["input_ids"])

    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)
    found, expected = gradients(model, packed), gradients(reference, separate)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=1e-4, msg=name)


def test_no_mask_is_built_for_a_packed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(tmp_path)

    def refuse(**_: object) -> None:
        raise AssertionError("a mask of T × T was built")

    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    model(**packed_inputs(LENGTHS))


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_padded_batch_gives_what_transformers_own_attention_gives(tmp_path: Path, case: str) -> None:
    model = packed_model(tmp_path, case.partition(",")[0], **ARCHITECTURES[case])
    ids = torch.arange(3, 31).reshape(2, 14)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = model(ids, attention_mask=mask).logits
    expected = reference_model(tmp_path)(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_without_boundaries_documents_are_kept_apart_by_their_positions(tmp_path: Path) -> None:
    model = packed_model(tmp_path)
    inputs = packed_inputs(LENGTHS)
    by_positions = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
    torch.testing.assert_close(by_positions.logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_generating_with_left_padding_gives_the_answers_of_each_prompt_alone(tmp_path: Path) -> None:
    model, reference = packed_model(tmp_path), reference_model(tmp_path)
    prompts = [torch.arange(3, 3 + length) for length in (9, 2, 5)]
    batch = torch.stack([torch.cat([torch.zeros(9 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - len(p) for p in prompts]).long()

    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for prompt, row in zip(prompts, together, strict=True):
        alone = reference.generate(
            prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6, do_sample=False
        )
        answer = alone[0, len(prompt) :]
        assert row[9 : 9 + len(answer)].tolist() == answer.tolist()


def test_bf16_agrees_with_fp32_to_bf16_precision(tmp_path: Path) -> None:
    model = packed_model(tmp_path)
    inputs = packed_inputs(LENGTHS)
    exact = model(**inputs).logits
    rounded = model.bfloat16()(**inputs).logits.float()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_under_autocast_queries_of_one_type_and_values_of_another_are_attended(tmp_path: Path) -> None:
    model = packed_model(tmp_path)
    inputs = packed_inputs(LENGTHS)
    exact = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**inputs).logits.float()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_only_trained_positions_reach_the_output_head(tmp_path: Path) -> None:
    model = packed_model(tmp_path)
    inputs = packed_inputs([3, 4])
    labels = torch.tensor([[-100, 5, -100, -100, 6, 7, -100]])
    batch = SimpleNamespace(
        input_ids=inputs["input_ids"],
        labels=labels,
        position_ids=inputs["position_ids"],
        cu_seqlens=inputs["cu_seq_lens_q"],
        max_seqlen=4,
    )
    trained = model(input_ids=batch.input_ids, **forward_kwargs(batch)).logits
    torch.testing.assert_close(trained, model(**inputs).logits[:, [1, 4, 5]])


def test_dropout_on_the_scores_is_applied_inside_documents(tmp_path: Path) -> None:
    model = packed_model(tmp_path, attention_dropout=0.5)
    inputs = packed_inputs(LENGTHS)
    exact = model.eval()(**inputs).logits
    assert not torch.equal(model.train()(**inputs).logits, exact)
