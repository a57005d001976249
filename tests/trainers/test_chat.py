"""Answers: greedy, through the chat template, and the base's beside those of the tuned model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainers.chat import answer
from finetune_trainers.errors import UserError
from tests.trainers.test_artifact import trained
from tests.trainers.tiny import tiny_model, tiny_tokenizer


def expected_answer(folder: Path, prompt: str, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer(text)["input_ids"]
    start = len(ids)
    while len(ids) < start + num_tokens:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def test_an_answer_is_the_most_probable_one_to_the_templated_prompt(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    [found] = answer(tmp_path, None, ["Who are you?"], max_new_tokens=8)
    assert found.prompt == "Who are you?"
    assert found.tuned == expected_answer(tmp_path, "Who are you?", 8)
    assert found.base is None


def test_the_base_answers_as_if_there_were_no_adapter(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    run = trained(tmp_path / "model", {"tuning": {"lora": {"targetModules": ["all-linear"]}}})
    run.write(tmp_path / "adapter")
    prompts = ["Hello", "What is a list?"]
    compared = answer(tmp_path / "model", tmp_path / "adapter", prompts, compare_base=True, max_new_tokens=8)
    alone = answer(tmp_path / "model", None, prompts, max_new_tokens=8)
    assert [found.base for found in compared] == [found.tuned for found in alone]
    assert [found.tuned for found in compared] != [found.base for found in compared]


def test_a_model_without_a_template_continues_the_text(tmp_path: Path) -> None:
    tiny_model(tmp_path, tokenizer=tiny_tokenizer(chat_template=None))
    assert answer(tmp_path, None, ["Once upon"], max_new_tokens=4)[0].tuned


def test_folders_that_are_not_what_they_should_be_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"has no config\.json; name the folder of a model"):
        answer(tmp_path, None, ["Hello"])
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; name the folder of an adapter"):
        answer(tmp_path / "model", tmp_path / "model", ["Hello"])
    with pytest.raises(UserError, match="comparing with the base needs an adapter"):
        answer(tmp_path / "model", None, ["Hello"], compare_base=True)
