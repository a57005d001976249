"""Where a score is read: at the last token that is not padding, in every document, as transformers does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.models import load_model, meta_model, prepare_model
from finetune_trainers.score_head import begin_head, has_score_head, padding_token, scores
from tests.trainers.tiny import plan_for, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
REWARD: dict[str, Any] = {"method": {"reward": {"maxSeqLength": 64}}, "tuning": {"full": {}}}


def batch_of(*documents: list[int]) -> Batch:
    """The documents in one packed row, nothing trained."""
    ids = torch.tensor([[token for document in documents for token in document]])
    lengths = [len(document) for document in documents]
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORED),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        num_trained_tokens=0,
    )


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "GPT2"])
def test_packed_scores_are_those_of_plain_transformers(architecture: str, tmp_path: Path) -> None:
    if architecture == "GPT2":
        tiny_model(tmp_path, architecture, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        tiny_model(tmp_path, architecture)
    plan = plan_for(tmp_path, {"training.seed": 3} | REWARD)
    prepared = prepare_model(plan, tmp_path / "cache", lambda _percent, _text: None)
    packed = load_model(prepared, plan, CPU).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32).eval()
    plain.config.pad_token_id = 0
    begin_head(plain, 3)
    documents = [[5, 6, 7, 1], [8, 9], [10, 11, 12, 13, 0, 0]]  # 0 is padding: it is not where the score is read
    with torch.no_grad():
        found = scores(packed, batch_of(*documents), padding_id=0)
        padded = torch.tensor([document + [0] * (6 - len(document)) for document in documents])
        wanted = plain(padded, attention_mask=(padded != 0).long()).logits[:, 0]
        alone = torch.cat([plain(torch.tensor([document])).logits[:, 0] for document in documents])
    assert torch.allclose(found, alone, atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert found.std() > 1e-3


def test_a_document_of_padding_alone_is_read_at_its_first_token(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    plan = plan_for(tmp_path, REWARD)
    prepared = prepare_model(plan, tmp_path / "cache", lambda _percent, _text: None)
    model = load_model(prepared, plan, CPU).eval()
    with torch.no_grad():
        found = scores(model, batch_of([5, 6], [0, 0]), padding_id=0)
        alone = scores(model, batch_of([0]), padding_id=0)
    assert torch.allclose(found[1], alone[0], atol=1e-5)


def test_scores_of_a_model_in_half_precision_have_the_digits_of_fp32(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    plan = plan_for(tmp_path, REWARD)
    model = load_model(prepare_model(plan, tmp_path / "cache", lambda _percent, _text: None), plan, CPU)
    assert scores(model.bfloat16(), batch_of([5, 6]), padding_id=0).dtype is torch.float32


def test_the_head_follows_from_the_seed_alone(tmp_path: Path) -> None:
    tiny_model(tmp_path)

    def head(seed: int) -> torch.Tensor:
        plan = plan_for(tmp_path, {"training.seed": seed} | REWARD)
        prepared = prepare_model(plan, tmp_path / "cache", lambda _percent, _text: None)
        weight = load_model(prepared, plan, CPU).get_submodule("score").weight
        assert isinstance(weight, torch.Tensor)
        return weight

    torch.manual_seed(1)
    first = head(5)
    torch.manual_seed(2)
    assert torch.equal(head(5), first)
    assert not torch.equal(head(6), first)


@pytest.mark.parametrize(
    ("special", "wanted"),
    [
        ({"pad_token": "<pad>", "eos_token": "<|im_end|>"}, "<pad>"),
        ({"pad_token": "<|im_end|>", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}, "<|im_start|>"),
        ({"pad_token": None, "eos_token": "<|im_end|>", "unk_token": "<pad>"}, "<pad>"),
        ({"pad_token": None, "eos_token": "<|im_end|>"}, "<|im_end|>"),
    ],
)
def test_batches_are_padded_with_a_token_that_ends_no_answer(special: dict[str, Any], wanted: str) -> None:
    tokenizer = tiny_tokenizer()
    for name, token in special.items():
        setattr(tokenizer, name, token)
    assert padding_token(tokenizer) == wanted


def test_a_model_without_a_score_stays_what_it_is_and_is_told(tmp_path: Path) -> None:
    """Cohere has no `...ForSequenceClassification` in transformers."""
    from finetune_trainers.errors import UserError

    tiny_model(tmp_path, "Cohere")
    config = AutoConfig.from_pretrained(tmp_path)
    assert not has_score_head(config)
    assert type(meta_model(config, scores=True)).__name__ == "CohereForCausalLM"
    with pytest.raises(UserError, match="transformers knows no CohereForCausalLM with a score in the place"):
        prepare_model(plan_for(tmp_path, REWARD), tmp_path / "cache", lambda _percent, _text: None)
