"""Questions on their way to the model that answers them: their tokens, what stays beside them, their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from finetune_api.spec import Columns, DataFormat, DataSource
from finetune_trainers.data.cache import SourceArrays
from finetune_trainers.data.formats import choose_format
from finetune_trainers.data.order import TrainOrder
from finetune_trainers.data.questions import Questions
from finetune_trainers.data.turns import Prompt
from tests.bad_input.data_sets import asking

USER = {"role": "user", "content": "one two"}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "zero"}, {"role": "assistant", "content": "nine"}]


def read(row: dict[str, Any], **fields: Any) -> Any:
    source = DataSource(source="file:///data/train.jsonl", **fields)
    return choose_format(source, row, {DataFormat.PROMPT}).read(row)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        pytest.param({"prompt": "one two"}, None, Prompt([USER], {}), id="text alone"),
        pytest.param({"prompt": [*EARLIER, USER]}, None, Prompt([*EARLIER, USER], {}), id="a conversation"),
        pytest.param(
            {"prompt": "one two", "system": "Be brief.", "answer": 3},
            None,
            Prompt([SYSTEM, USER], {"answer": 3}),
            id="a system column, and an answer",
        ),
        pytest.param(
            {"prompt": "one two", "system": None, "tests": [{"in": [1], "out": None}], "label": True},
            None,
            Prompt([USER], {"tests": [{"in": [1], "out": None}], "label": True}),
            id="columns of any kind",
        ),
        pytest.param(
            {"q": "one two", "prompt": "kept"},
            Columns(prompt="q"),
            Prompt([USER], {"prompt": "kept"}),
            id="columns by other names",
        ),
        pytest.param(
            {"prompt": "one two", "completion": "three", "chosen": "a", "rejected": "b"},
            None,
            Prompt([USER], {"completion": "three", "chosen": "a", "rejected": "b"}),
            id="what would be answers to other methods",
        ),
    ],
)
def test_every_layout_of_a_question_is_read_with_all_its_other_columns(
    row: dict[str, Any], columns: Columns | None, expected: Prompt
) -> None:
    assert read(row, columns=columns) == expected


def text_of(workshop: Any, ids: list[int]) -> str:
    tokenizer = Tokenizer.from_file(str(Path(workshop.model.tokenizer_folder) / "tokenizer.json"))
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_a_question_ends_where_the_answer_begins_and_nothing_of_it_is_trained_on(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": "one two", "system": "Be brief.", "answer": "three"}])
    [source] = workshop.prepare(asking()).train
    assert (source.num_rows, source.num_sequences, source.num_trained_tokens) == (1, 1, 0)
    [question] = Questions([source], 0)
    assert text_of(workshop, question.ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n"
    )
    assert question.messages == [SYSTEM, USER]
    assert question.fields == {"answer": "three"}
    assert (question.source, question.row) == (0, 0)


def test_fields_come_back_from_the_cache_as_they_were(workshop: Any) -> None:
    odd = {
        "text": "caf\u00e9 \U0001f600 \n",
        "nothing": None,
        "numbers": [1, 2.5, -3e300],
        "deep": {"a": [{"b": True}]},
    }
    rows = [{"prompt": f"{number} ?", **odd, "number": number} for number in range(3)]
    workshop.write("train.jsonl", rows)
    first = workshop.prepare(asking()).train
    again = workshop.prepare(asking()).train
    assert again[0].from_cache
    for sources in (first, again):
        assert [question.fields for question in Questions(sources, 0)] == [odd | {"number": n} for n in range(3)]


def test_dropped_questions_leave_no_fields_behind(workshop: Any) -> None:
    rows = [{"prompt": "one two three " * (12 if number % 2 else 1), "number": number} for number in range(6)]
    workshop.write("train.jsonl", rows)
    [source] = workshop.prepare(asking(longRows="drop")).train
    assert (source.num_rows, source.num_rows_dropped) == (3, 3)
    kept = list(Questions([source], 0))
    assert [question.fields["number"] for question in kept] == [0, 2, 4]
    assert [question.row for question in kept] == [0, 1, 2]
    assert all(question.messages[0]["content"] == "one two three " for question in kept)


def test_a_question_may_fill_all_that_its_answer_leaves(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": "one two three"}])
    [question] = Questions(workshop.prepare(asking()).train, 0)
    room = len(question.ids) + 16
    assert workshop.prepare(asking(maxSeqLength=room)).train[0].num_rows == 1
    [dropped] = [workshop.prepare(asking(maxSeqLength=room, sampling={"maxNewTokens": 15})).train[0].num_rows_dropped]
    assert dropped == 0


def test_the_stream_has_the_order_of_training_and_all_rows_in_each_epoch(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": f"{number} ?", "number": number} for number in range(7)])
    workshop.write("more.jsonl", [{"prompt": f"more {number} ?", "number": 100 + number} for number in range(4)])
    sources = [{"source": "file://./train.jsonl"}, {"source": "file://./more.jsonl", "weight": 0.5}]
    prepared = workshop.prepare(asking() | {"data.train": sources}).train
    questions, order = Questions(prepared, 3), TrainOrder(prepared, 3)
    assert (questions.per_epoch, len(questions)) == (9, 11)
    for position in (0, 5, 8, 9, 20, 4):
        question = questions.at(position)
        assert (question.source, question.row) == order.slot(position)[1:]
        assert question.fields["number"] == (100 if question.source else 0) + question.row
    epochs = [[questions.at(epoch * 9 + place) for place in range(9)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(q.row for q in epoch if q.source == 0) == list(range(7))
    seconds = [q.row for epoch in epochs for q in epoch if q.source == 1]
    assert sorted(seconds) == [0, 1, 2, 3], "half of the rows in one epoch, the other half in the next"
    assert [q.row for q in epochs[0]] != [q.row for q in epochs[1]]


def test_ppo_and_grpo_share_one_cache_entry_as_long_as_prompts_have_the_same_room(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": "one two"}])
    settings = asking()["method"]["grpo"]

    def folder(method: str, **changes: Any) -> str:
        return str(workshop.prepare({"method": {method: settings | changes}}).train[0].folder)

    assert folder("grpo") == folder("ppo") == folder("ppo", maxSeqLength=65, sampling={"maxNewTokens": 17})
    assert folder("grpo", maxSeqLength=65) != folder("grpo")


@pytest.mark.parametrize("name", ["rows.jsonl", "row_starts.npy"])
def test_a_damaged_field_makes_the_entry_anew(workshop: Any, name: str) -> None:
    workshop.write("train.jsonl", [{"prompt": "one two", "answer": "three"}])
    file = Path(workshop.prepare(asking()).train[0].folder) / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + b"x" + whole[-1:])
    assert not workshop.prepare(asking()).train[0].from_cache
    assert file.read_bytes() == whole


def test_other_methods_keep_no_rows(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": "one", "completion": "two"}])
    folder = Path(workshop.prepare().train[0].folder)
    assert not (folder / "rows.jsonl").exists()
    with pytest.raises(AssertionError, match="only questions are kept"):
        SourceArrays(folder).kept(0)


def test_rows_are_json_lines_that_people_can_read(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": "one two", "answer": "three"}, {"prompt": "x", "answer": "y"}])
    folder = Path(workshop.prepare(asking()).train[0].folder)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["fields"]["answer"] for line in lines] == ["three", "y"]
