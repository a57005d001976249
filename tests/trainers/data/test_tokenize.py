"""Which tokens a row becomes, and which of them are inside the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from finetune_trainers.data.cache import SourceArrays
from finetune_trainers.data.template import STORED_TEMPLATES
from finetune_trainers.prepared import PreparedSource

CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "  And of Italy \U0001f1ee\U0001f1f9?"},
    {"role": "assistant", "content": "Rome \U0001f600"},
]
TRAINED = ["The capital of France is Paris.", "Rome \U0001f600"]


def rows_of(source: PreparedSource) -> list[tuple[list[int], list[bool]]]:
    """(ids, trained) of every row, in the order of the data."""
    arrays = SourceArrays(Path(source.folder))
    spans = zip(arrays.offsets, arrays.offsets[1:], strict=False)
    return [(arrays.tokens[a:b].tolist(), arrays.trained[a:b].tolist()) for a, b in spans]


def parts(tokenizer: Tokenizer, ids: list[int], trained: list[bool]) -> list[str]:
    """The text of each run of trained tokens."""
    mask = np.array([False, *trained, False])
    edges = np.flatnonzero(mask[1:] != mask[:-1]).tolist()
    return [
        tokenizer.decode(ids[start:end], skip_special_tokens=False)
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def tokenizer_of(workshop: Any) -> Tokenizer:
    return Tokenizer.from_file(str(Path(workshop.model.tokenizer_folder) / "tokenizer.json"))


def only_row(workshop: Any, rows: list[Any], changes: dict[str, Any] | None = None) -> tuple[list[int], list[bool]]:
    workshop.write("train.jsonl", rows)
    prepared = workshop.prepare({"method.sft.maxSeqLength": 512, **(changes or {})})
    (row,) = rows_of(prepared.train[0])
    return row


def test_the_answers_and_their_end_of_turn_are_trained_by_a_real_tokenizer(real_workshop: Any) -> None:
    ids, trained = only_row(real_workshop, [{"messages": CHAT}])
    assert parts(tokenizer_of(real_workshop), ids, trained) == [f"{text}<|im_end|>" for text in TRAINED]


@pytest.mark.parametrize("template", STORED_TEMPLATES)
def test_stored_templates_close_answers_with_the_end_of_sequence_token(workshop: Any, template: str) -> None:
    workshop.with_template(STORED_TEMPLATES[template])
    ids, trained = only_row(workshop, [{"messages": CHAT}])
    found = parts(tokenizer_of(workshop), ids, trained)
    assert [text.removeprefix(" ") for text in found] == [f"{text}</s>" for text in TRAINED]


def test_the_tokens_are_those_of_the_model_s_own_template_call(real_workshop: Any) -> None:
    from transformers import AutoTokenizer

    ids, _ = only_row(real_workshop, [{"messages": CHAT}])
    theirs = AutoTokenizer.from_pretrained(real_workshop.model.tokenizer_folder).apply_chat_template(
        CHAT, tokenize=True, return_dict=False
    )
    # Theirs goes on with the line break that the template puts after the last turn.
    assert theirs[: len(ids)] == ids
    assert len(theirs) == len(ids) + 1


def test_an_answer_is_the_whole_of_what_the_prompt_leaves(real_workshop: Any) -> None:
    """Prompt ids as at inference, then exactly the trained ids."""
    from transformers import AutoTokenizer

    ids, trained = only_row(real_workshop, [{"messages": CHAT[:2]}])
    prompt = AutoTokenizer.from_pretrained(real_workshop.model.tokenizer_folder).apply_chat_template(
        CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    assert trained == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_a_token_that_the_answer_shares_with_the_prompt_is_trained(real_workshop: Any) -> None:
    """The template's line break and the answer's first blank are one token here; leaving it out would lose a
    part of the answer, as it would lose the whole first word after a prompt that ends in a blank."""
    chat = [CHAT[0], {"role": "assistant", "content": "  Rome"}]
    ids, trained = only_row(real_workshop, [{"messages": chat}])
    assert parts(tokenizer_of(real_workshop), ids, trained) == ["\n  Rome<|im_end|>"]


def test_loss_on_all_trains_every_token_but_the_first(workshop: Any) -> None:
    _, trained = only_row(workshop, [{"messages": CHAT}], {"method.sft.lossOn": "all"})
    assert trained == [False] + [True] * (len(trained) - 1)


NO_STOP = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_without_a_stop_token_gets_one_and_a_note(workshop: Any) -> None:
    workshop.with_template(NO_STOP)
    ids, trained = only_row(workshop, [{"messages": CHAT[:2]}])
    assert parts(tokenizer_of(workshop), ids, trained) == [" The capital of France is Paris.</s>"]
    assert "end-of-sequence" in workshop.messages[-1][1]


def test_an_answer_in_the_middle_is_trained_to_the_last_token_of_its_last_character(workshop: Any) -> None:
    workshop.with_template(NO_STOP)
    chat = [CHAT[2], CHAT[3], CHAT[0], CHAT[1]]
    ids, trained = only_row(workshop, [{"messages": chat}])
    assert parts(tokenizer_of(workshop), ids, trained)[0] == " Rome \U0001f600"


def test_a_template_that_marks_its_answers_is_believed(workshop: Any) -> None:
    workshop.with_template(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{{ eos_token }}{% else %}Q:{{ m['content'] }}{% endif %}{% endfor %}"
    )
    ids, trained = only_row(workshop, [{"messages": CHAT}])
    assert parts(tokenizer_of(workshop), ids, trained) == [f"{text}</s>" for text in TRAINED]


def test_prompt_and_completion_are_joined_where_there_is_no_template(workshop: Any) -> None:
    workshop.with_template(None)
    ids, trained = only_row(workshop, [{"prompt": "one two three", "completion": " four"}])
    tokenizer = tokenizer_of(workshop)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "one two three four</s>"
    assert parts(tokenizer, ids, trained) == [" four</s>"]


def test_a_long_text_becomes_consecutive_sequences_without_losing_a_token(workshop: Any) -> None:
    text = " ".join(str(number) for number in range(500))
    workshop.write("train.jsonl", [{"text": text}])
    prepared = workshop.prepare({"method.sft.maxSeqLength": 64})
    rows = rows_of(prepared.train[0])
    ids = [token for row, _ in rows for token in row]
    assert tokenizer_of(workshop).decode(ids, skip_special_tokens=False) == f"{text}</s>"
    assert all(len(row) == 64 for row, _ in rows[:-1])
    assert all(trained == [False] + [True] * (len(row) - 1) for row, trained in rows)
    assert prepared.train[0].num_rows == 1


def test_a_text_file_is_one_document_however_many_blocks_it_is_read_in(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainers.data.readers.TXT_BLOCK_BYTES", 40)
    text = "".join(f"Line number {number} é.\n" for number in range(40))
    uri = workshop.write("book.txt", text)
    rows = rows_of(workshop.prepare({"data.train.0.source": uri}).train[0])
    ids = [token for row, _ in rows for token in row]
    assert tokenizer_of(workshop).decode(ids, skip_special_tokens=False) == f"{text}</s>"


def test_a_truncated_row_keeps_its_beginning(workshop: Any) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "one two three " * 100}]
    ids, trained = only_row(
        workshop, [{"messages": chat}], {"method.sft.maxSeqLength": 80, "method.sft.longRows": "truncate"}
    )
    assert len(ids) == 80
    assert trained[-1]
    assert "1 rows truncated" in workshop.messages[-1][1]


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_a_row_whose_answer_lies_beyond_the_limit_is_dropped_and_counted(workshop: Any, policy: str) -> None:
    long = [{"role": "user", "content": "one two three " * 100}, CHAT[1]]
    workshop.write("train.jsonl", [{"messages": long}, {"messages": CHAT[:2]}])
    source = workshop.prepare({"method.sft.maxSeqLength": 80, "method.sft.longRows": policy}).train[0]
    assert (source.num_rows, source.num_rows_dropped) == (1, 1)
