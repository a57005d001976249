"""Rows of every format become the same conversations; which format it is is read from the columns."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.spec import Columns, DataFormat, DataSource
from finetune_trainers.data.faults import RowError
from finetune_trainers.data.formats import Conversation, Document, choose_format

QUESTION = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def source(**fields: Any) -> DataSource:
    return DataSource(source="file:///data/train.jsonl", **fields)


@pytest.mark.parametrize(
    ("row", "expected", "columns"),
    [
        pytest.param({"messages": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER], None, id="messages"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]},
            [QUESTION, ANSWER],
            None,
            id="messages in parts of text",
        ),
        pytest.param({"prompt": "Q", "completion": "A"}, [QUESTION, ANSWER], None, id="prompt-completion"),
        pytest.param(
            {"prompt": "Q", "completion": "A", "system": "S"},
            [SYSTEM, QUESTION, ANSWER],
            None,
            id="prompt-completion with a system message",
        ),
        pytest.param({"instruction": "Q", "output": "A", "input": ""}, [QUESTION, ANSWER], None, id="alpaca"),
        pytest.param(
            {"instruction": "I", "output": "A", "input": "about"},
            [{"role": "user", "content": "I\n\nabout"}, ANSWER],
            None,
            id="alpaca with an input",
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            [SYSTEM, QUESTION, ANSWER],
            None,
            id="sharegpt with a system column",
        ),
        pytest.param(
            {"ask": "Q", "say": "A", "prompt": "other"},
            [QUESTION, ANSWER],
            Columns(prompt="ask", completion="say"),
            id="columns by other names",
        ),
        pytest.param(
            {"chat": [QUESTION, ANSWER]}, [QUESTION, ANSWER], Columns(messages="chat"), id="messages elsewhere"
        ),
    ],
)
def test_the_format_is_read_from_the_columns(row: Any, expected: Any, columns: Columns | None) -> None:
    form = choose_format(source(columns=columns), row)
    assert form.read(row) == Conversation(expected)


def test_text_is_a_document() -> None:
    row = {"text": "Once upon a time."}
    assert choose_format(source(), row).read(row) == Document("Once upon a time.")


def test_a_named_format_decides_between_columns_that_fit_two() -> None:
    row = {"text": "T", "messages": [QUESTION, ANSWER]}
    assert choose_format(source(format="text"), row).read(row) == Document("T")


def test_mapped_columns_rule_out_formats_that_have_no_such_column() -> None:
    row = {"text": "T", "body": "B"}
    assert choose_format(source(columns=Columns(text="body")), row).read(row) == Document("B")


def test_reasoning_is_kept_under_both_names_that_templates_read() -> None:
    row = {"messages": [QUESTION, {**ANSWER, "reasoning_content": "because"}]}
    item = choose_format(source(), row).read(row)
    assert isinstance(item, Conversation)
    assert item.messages[1] == {**ANSWER, "reasoning_content": "because", "thinking": "because"}


def test_an_ambiguous_row_names_the_formats_to_choose_from() -> None:
    with pytest.raises(RowError, match="set it to messages or text"):
        choose_format(source(), {"text": "T", "messages": [QUESTION, ANSWER]})


@pytest.mark.parametrize("form", [form for form in DataFormat if form is not DataFormat.AUTO])
def test_every_format_names_the_column_that_a_row_lacks(form: DataFormat) -> None:
    with pytest.raises(RowError, match=f"has no column .* which the format {form} needs; the columns are other"):
        choose_format(source(format=form), {}).read({"other": "x"})
