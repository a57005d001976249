"""Greedy answers of a tuned model, beside those of its base. Called by `python -m finetune_trainers chat`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from finetune_api.failures import Problem
from finetune_trainers.artifact_folder import ADAPTER_WEIGHTS, CALIBRATION
from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.errors import UserError
from finetune_trainers.tuning import peft_warnings_off

__all__ = ["Answer", "answer"]


@dataclass(frozen=True)
class Answer:
    """What the model says to one prompt."""

    prompt: str
    tuned: str
    base: str | None = None
    """The base's answer, when it was asked for."""


def answer(
    model_folder: Path,
    adapter_folder: Path | None,
    prompts: Sequence[str],
    compare_base: bool = False,
    max_new_tokens: int = 128,
) -> list[Answer]:
    """The most probable answer to each prompt, as a user's message through the model's chat template.

    `compare_base` asks the model without its adapter as well. Raises UserError about the folders.
    """
    if compare_base and adapter_folder is None:
        raise _refused(model_folder, "comparing with the base needs an adapter to leave out; give --adapter")
    _check_folder(model_folder, "config.json", "a model")
    if adapter_folder is not None:
        _check_folder(adapter_folder, ADAPTER_WEIGHTS, "an adapter")
    for folder in (model_folder, adapter_folder):
        if folder is not None and (folder / CALIBRATION).is_file():
            raise _refused(folder, "is a reward model: it scores answers and writes none; name a model that answers")
    tokenizer = AutoTokenizer.from_pretrained(_with_tokenizer(model_folder, adapter_folder), local_files_only=True)
    model = _load(model_folder, adapter_folder)
    inputs = [_encode(tokenizer, prompt, model.device) for prompt in prompts]
    tuned = list(_generate(model, tokenizer, inputs, max_new_tokens))
    base: list[str | None] = [None] * len(prompts)
    if compare_base:
        with model.disable_adapter():
            base = list(_generate(model, tokenizer, inputs, max_new_tokens))
    return [Answer(*texts) for texts in zip(prompts, tuned, base, strict=True)]


def _check_folder(folder: Path, file: str, kind: str) -> None:
    if not (folder / file).is_file():
        raise _refused(folder, f"has no {file}; name the folder of {kind}")


def _with_tokenizer(model_folder: Path, adapter_folder: Path | None) -> Path:
    """The adapter's folder when it has a tokenizer, since it is the one that was trained with."""
    if adapter_folder is not None and (adapter_folder / "tokenizer_config.json").is_file():
        return adapter_folder
    return model_folder


def _load(model_folder: Path, adapter_folder: Path | None) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto", local_files_only=True)
    model.to(device)
    if adapter_folder is not None:
        from finetune_trainers.lean_peft import peft

        with peft_warnings_off():
            model = peft.PeftModel.from_pretrained(model, str(adapter_folder))
    use_fast_products(model, model.dtype, device)
    return model.eval()


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, device: torch.device) -> Tensor:
    """[1, T]. A model without a chat template is given the prompt as it is."""
    if tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids], device=device)


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, inputs: Iterable[Tensor], max_new_tokens: int
) -> Iterator[str]:
    for ids in inputs:
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        yield str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _refused(folder: Path, message: str) -> UserError:
    problem = Problem(file=str(folder), message=message)
    return UserError(str(problem), [problem])
