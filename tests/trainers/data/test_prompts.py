"""Questions for evaluation by generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from finetune_trainers.data.prepare import eval_prompts
from finetune_trainers.errors import UserError

CHAT = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven."},
]


def prompts(workshop: Any, limit: int) -> list[tuple[str, str]]:
    plan = workshop.plan({"data.eval": [{"source": "file://./a.jsonl"}, {"source": "file://./b.jsonl", "maxRows": 1}]})
    tokenizer = Tokenizer.from_file(str(Path(workshop.model.tokenizer_folder) / "tokenizer.json"))
    found = eval_prompts(plan, workshop.model, limit)
    return [(tokenizer.decode(prompt.prompt_ids, skip_special_tokens=False), prompt.reference) for prompt in found]


def test_the_last_answer_is_asked_for_with_everything_before_it(workshop: Any) -> None:
    workshop.write("a.jsonl", [{"messages": CHAT}])
    workshop.write("b.jsonl", [{"prompt": "P", "completion": "C"}] * 3)
    first, second = prompts(workshop, 10)
    assert first[0].endswith("Four.</s>\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n")
    assert first[1] == "Seven."
    assert second == ("<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n", "C")


def test_no_more_rows_are_asked_than_the_limit(workshop: Any) -> None:
    workshop.write("a.jsonl", [{"messages": CHAT}] * 5)
    workshop.write("b.jsonl", [{"messages": CHAT}])
    assert len(prompts(workshop, 3)) == 3


def test_running_text_cannot_be_asked(workshop: Any) -> None:
    workshop.write("a.jsonl", [{"text": "Once upon a time."}])
    with pytest.raises(UserError, match=r"spec.training.generation: needs questions and answers"):
        prompts(workshop, 3)
