"""Several answers to each prompt, by a small model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_api.answers import Step
from finetune_api.preference_data import CandidatesReport, ToWrite
from finetune_trainers.errors import DataError, UserError
from finetune_trainers.lean_peft import peft
from finetune_trainers.merge import base_weights
from finetune_trainers.preference_data.candidates import write_candidates
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.tiny import tiny_model, tiny_tokenizer

# PEFT and we ask transformers by names that are going to change
pytestmark = WHEN_TRAINING

ROWS: list[dict[str, Any]] = [
    {"prompt": "hi", "answer": "42"},
    {"prompt": [{"role": "user", "content": "a longer question"}], "system": "Be brief."},
    {"prompt": "and?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writer")
    tiny_model(folder)
    return folder


class Desk:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.steps: list[Step] = []

    def write(self, rows: list[dict[str, Any]] = ROWS, **asked: Any) -> tuple[list[dict[str, Any]], CandidatesReport]:
        source, to = self.folder / "prompts.jsonl", self.folder / "answers.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = {"model": f"file://{self.model}", "max_new_tokens": 8, "overwrite": True}
        report = write_candidates(
            ToWrite(source=f"file://{source}", to=str(to), **(defaults | asked)), self.steps.append
        )
        return [json.loads(line) for line in to.read_text().splitlines()], report


@pytest.fixture
def desk(tmp_path: Path, model: Path) -> Desk:
    return Desk(tmp_path, model)


def test_every_prompt_has_different_answers_and_keeps_its_columns(desk: Desk) -> None:
    rows, report = desk.write(num=4)
    assert [row["prompt"] for row in rows] == [
        "hi",
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a longer question"}],
        "and?",
    ]
    assert rows[0]["answer"] == "42"
    assert all(len(set(row["answers"])) == len(row["answers"]) > 1 for row in rows)
    assert (report.rows_read, report.answers, report.left_out) == (3, 12, 0)
    assert (desk.steps[-1].done, desk.steps[-1].total) == (12, 12)


def test_samples_follow_from_the_seed_and_not_from_the_batch(desk: Desk) -> None:
    first, _ = desk.write(seed=3)
    assert desk.write(seed=3, batch_size=1)[0] == first
    assert desk.write(seed=4)[0] != first
    assert desk.write(ROWS[:1], seed=3)[0] == first[:1]


def test_beams_are_those_that_transformers_finds_and_the_likeliest_comes_first(desk: Desk, model: Path) -> None:
    rows, report = desk.write(method="beam", num=3, num_beams=5)
    writer: Any = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = tiny_tokenizer()
    for row in rows[:1]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            found = writer.generate(
                input_ids=torch.tensor([ids]),
                max_new_tokens=8,
                num_beams=5,
                num_return_sequences=3,
                do_sample=False,
                early_stopping=True,
            )
        wanted = [str(tokenizer.decode(one[len(ids) :], skip_special_tokens=True)).strip() for one in found]
        assert row["answers"] == list(dict.fromkeys(text for text in wanted if text))
    assert report.answers == 9


@pytest.mark.parametrize("sampling", [{"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_a_prompt_with_one_answer_only_is_left_out_and_counted(desk: Desk, sampling: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no row is left"):
        desk.write(num=2, **sampling)


def test_a_prompt_that_is_there_twice_has_other_answers_in_each_row(desk: Desk) -> None:
    first, second = desk.write([ROWS[0]] * 2)[0]
    assert first["prompt"] == second["prompt"]
    assert first["answers"] != second["answers"]


def test_beams_are_chosen_by_the_length_penalty_that_is_asked_for(desk: Desk, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "ends")
    config = tmp_path / "ends" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": list(range(3, 300, 2))}))

    def length(penalty: float) -> int:
        asked: dict[str, Any] = {"method": "beam", "num": 2, "num_beams": 4, "length_penalty": penalty}
        rows, _ = desk.write(model=f"file://{tmp_path}/ends", **asked)
        return sum(len(answer) for row in rows for answer in row["answers"])

    assert length(-2.0) < length(4.0)


def test_who_wrote_stands_beside_the_rows(desk: Desk, model: Path) -> None:
    _, report = desk.write(seed=7)
    told = json.loads(Path(report.data.provenance).read_text())
    assert told["model"]["folder"] == str(model)
    assert (told["settings"]["seed"], told["settings"]["method"]) == (7, "sample")
    assert told["counts"]["answers"] == report.answers


def test_other_weights_at_the_same_paths_are_other_writers(desk: Desk, tmp_path: Path) -> None:
    def told() -> dict[str, Any]:
        _, report = desk.write(ROWS[:1], adapter=str(tmp_path / "adapter"))
        found: dict[str, Any] = json.loads(Path(report.data.provenance).read_text())["model"]["digests"]
        return found

    desk.model = Path(shutil.copytree(desk.model, tmp_path / "model"))
    writer: Any = AutoModelForCausalLM.from_pretrained(desk.model)
    settings = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    peft.get_peft_model(writer, settings).save_pretrained(str(tmp_path / "adapter"))
    first = told()
    assert told() == first
    assert first["model"] == base_weights(desk.model).digest()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    second = told()
    assert (second["model"], second["adapter"] == first["adapter"]) == (first["model"], False)
    file = desk.model / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    third = told()
    assert (third["model"] == first["model"], third["adapter"]) == (False, second["adapter"])


@pytest.mark.parametrize(
    ("rows", "asked", "kind", "said"),
    [
        (ROWS, {"method": "beam", "num": 4, "num_beams": 3}, UserError, "--beams: 3 beams give no 4 answers"),
        (ROWS, {"model": "file:///absent"}, UserError, "--model: no such file or folder"),
        (
            [{"prompt": "x" * 300}],
            {},
            DataError,
            r"prompts.jsonl:1: prompt: has \d+ tokens, and the model has room for",
        ),
        ([{"prompt": "x", "answers": []}], {}, DataError, "answers: is where answers are written"),
        ([{"text": "x"}], {}, DataError, "prompts.jsonl:1: prompt: has no column 'prompt'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    desk: Desk, rows: list[dict[str, Any]], asked: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        desk.write(rows, **asked)
    assert not (desk.folder / "answers.jsonl").exists()
