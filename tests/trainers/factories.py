"""Small complete worlds for the trainers' tests: a model folder, rows of data, a plan.

    folder = tiny_model(tmp_path / "model")             a random Llama with a real tokenizer, in Hugging Face layout
    rows = write_rows(tmp_path / "rows.jsonl", 40)      prompt-completion rows of different lengths
    plan = tiny_plan(folder, rows, {"training.maxSteps": 3})

Dotted paths are those of tests.factories; the plan comes from the real planner.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from tests.factories import ABSENT, job

__all__ = ["ABSENT", "WORDS", "tiny_model", "tiny_plan", "write_pairs", "write_rated", "write_rows"]

SENTENCE = "the a one two cat dog bird sees likes finds red green blue small house tree river and or why"
WORDS = SENTENCE.split()

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(
    folder: Path,
    *,
    layers: int = 2,
    tied: bool = True,
    seed: int = 0,
    hidden_size: int = 64,
    intermediate_size: int = 96,
) -> Path:
    """A random Llama (vocabulary about 300, four heads) and a byte-level BPE tokenizer, saved at `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[2], pad_token=special[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_rows(path: Path, num_rows: int, seed: int = 0, shortest: int = 2, longest: int = 12) -> Path:
    """Prompt-completion rows of words; the completion repeats the prompt backwards, so there is something to learn."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_rows):
            words = draw.choices(WORDS, k=draw.randint(shortest, longest))
            file.write(json.dumps({"prompt": " ".join(words), "completion": " ".join(reversed(words))}) + "\n")
    return path


def tiny_plan(
    model: Path, rows: Path, changes: Mapping[str, Any] | None = None, *, eval_rows: Path | None = None
) -> RunPlan:
    """A plan for one CPU worker, full tuning in fp32; `changes` by dotted path below spec."""
    data: dict[str, Any] = {"train": [{"source": f"file://{rows}"}]}
    if eval_rows is not None:
        data["eval"] = [{"source": f"file://{eval_rows}"}]
    base: dict[str, Any] = {
        "model.source": f"file://{model}",
        "data": data,
        "method": {"sft": {"maxSeqLength": 128}},
        "cluster": {"workers": {"cpus": 1}},
        "tuning": {"full": {}},
        "training": {
            "maxSteps": 3,
            "globalBatchSize": 4,
            "learningRate": 0.001,
            "precision": "fp32",
            "seed": 7,
        },
    }
    return plan_run(job(base | dict(changes or {})))


def write_pairs(path: Path, num_rows: int, seed: int = 0, longest: int = 8) -> Path:
    """Pairs of answers: the better one repeats the prompt backwards, the worse one is other words."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(num_rows):
            words = draw.choices(WORDS, k=draw.randint(2, longest))
            worse = draw.choices(WORDS, k=draw.randint(2, longest))
            row = {"prompt": " ".join(words), "chosen": " ".join(reversed(words)), "rejected": " ".join([*worse, "or"])}
            file.write(json.dumps(row) + "\n")
    return path


def write_rated(path: Path, num_rows: int, seed: int = 0, longest: int = 8) -> Path:
    """Single answers, one in three of them bad."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(num_rows):
            words = draw.choices(WORDS, k=draw.randint(2, longest))
            good = number % 3 != 0
            answer = list(reversed(words)) if good else [*draw.choices(WORDS, k=draw.randint(2, longest)), "or"]
            row = {"prompt": " ".join(words), "completion": " ".join(answer), "label": good}
            file.write(json.dumps(row) + "\n")
    return path
