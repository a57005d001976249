"""Judged answers on their way to batches: which rows become which tokens, side by side, and what is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from finetune_api.preference_data import ToImport
from finetune_api.spec import Columns, DataFormat, DataSource
from finetune_trainers.data.batches import IGNORED, Batch, batches_in_order
from finetune_trainers.data.cache import SourceArrays
from finetune_trainers.data.formats import choose_format
from finetune_trainers.data.preferences import Preference, Rated
from finetune_trainers.data.prompts import eval_prompts
from finetune_trainers.data.turns import Conversation
from finetune_trainers.errors import DataError
from finetune_trainers.preference_data.importing import import_judgements

QUESTION = {"role": "user", "content": "one two"}
BETTER = {"role": "assistant", "content": "three"}
WORSE = {"role": "assistant", "content": "four"}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "zero"}, {"role": "assistant", "content": "nine"}]
PAIR = {"prompt": "one two", "chosen": "three", "rejected": "four"}
DPO: dict[str, Any] = {"method": {"dpo": {"maxSeqLength": 64}}}
KTO: dict[str, Any] = {"method": {"kto": {"maxSeqLength": 64}}}


def read(row: dict[str, Any], **fields: Any) -> Any:
    source = DataSource(source="file:///data/train.jsonl", **fields)
    known = {DataFormat.PREFERENCE, DataFormat.UNPAIRED_PREFERENCE}
    return choose_format(source, row, known).read(row)


def pair(*before: Any) -> tuple[Conversation, Conversation]:
    return Conversation([*before, BETTER]), Conversation([*before, WORSE])


@pytest.mark.parametrize(
    ("row", "expected", "columns"),
    [
        pytest.param(PAIR, pair(QUESTION), None, id="three texts"),
        pytest.param(
            {"prompt": [QUESTION], "chosen": [BETTER], "rejected": [WORSE]}, pair(QUESTION), None, id="three lists"
        ),
        pytest.param(
            {"prompt": [*EARLIER, QUESTION], "chosen": "three", "rejected": "four"},
            pair(*EARLIER, QUESTION),
            None,
            id="a conversation and two texts",
        ),
        pytest.param(
            {"chosen": [SYSTEM, QUESTION, BETTER], "rejected": [SYSTEM, QUESTION, WORSE]},
            pair(SYSTEM, QUESTION),
            None,
            id="whole conversations",
        ),
        pytest.param(
            {"prompt": "one two", "chosen": [QUESTION, BETTER], "rejected": [QUESTION, WORSE]},
            pair(QUESTION),
            None,
            id="whole conversations and their prompt once more",
        ),
        pytest.param(PAIR | {"system": "Be brief."}, pair(SYSTEM, QUESTION), None, id="a system column"),
        pytest.param(
            {"chosen": [QUESTION, BETTER], "rejected": [QUESTION, WORSE], "system": "Be brief."},
            pair(SYSTEM, QUESTION),
            None,
            id="a system column beside whole conversations",
        ),
        pytest.param(
            {"q": "one two", "good": "three", "bad": "four"},
            pair(QUESTION),
            Columns(prompt="q", chosen="good", rejected="bad"),
            id="columns by other names",
        ),
    ],
)
def test_every_layout_of_a_pair_becomes_the_same_two_conversations(
    row: dict[str, Any], expected: tuple[Conversation, Conversation], columns: Columns | None
) -> None:
    assert read(row, columns=columns) == Preference(*expected, margin=0.0)


def test_a_margin_is_read_where_there_is_one() -> None:
    assert read(PAIR | {"margin": 2}).margin == 2.0
    assert read(PAIR | {"margin": None}).margin == 0.0


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), (0, False)])
def test_a_label_says_whether_an_answer_is_good(label: Any, good: bool) -> None:
    row = {"prompt": "one two", "completion": "three", "label": label}
    assert read(row) == Rated(Conversation([QUESTION, BETTER]), good)


def documents(workshop: Any, source: Any) -> list[list[tuple[str, str]]]:
    """(all, trained) as text of each document of each sequence."""
    tokenizer = Tokenizer.from_file(str(Path(workshop.model.tokenizer_folder) / "tokenizer.json"))
    arrays = SourceArrays(Path(source.folder))

    def text(start: int, end: int, mask: Any) -> str:
        return str(tokenizer.decode(arrays.tokens[start:end][mask].tolist(), skip_special_tokens=False))

    return [
        [
            (text(start, end, slice(None)), text(start, end, arrays.trained[start:end]))
            for start, end in arrays.rows_of(seq)
        ]
        for seq in range(arrays.num_sequences)
    ]


def test_a_pair_is_two_documents_of_one_sequence_and_only_the_answers_are_trained_on(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": [*EARLIER, QUESTION], "chosen": "three", "rejected": "four"}, PAIR])
    [source] = workshop.prepare(DPO).train
    assert (source.num_rows, source.num_sequences) == (2, 2)
    first, second = documents(workshop, source)
    assert [trained for _, trained in first] == ["three</s>", "four</s>"]
    assert [trained for _, trained in second] == ["three</s>", "four</s>"]
    assert "nine" in first[0][0]
    assert second[0][0].endswith("one two<|im_end|>\n<|im_start|>assistant\nthree</s>")


def test_an_answer_stands_beside_the_one_before_and_is_marked_as_good_or_bad(workshop: Any) -> None:
    rows = [{"prompt": f"{n} ?", "completion": f"answer {n}", "label": n != 2} for n in range(1, 4)]
    workshop.write("train.jsonl", rows)
    [source] = workshop.prepare(KTO).train
    found = documents(workshop, source)
    assert [[trained for _, trained in sequence] for sequence in found] == [
        ["answer 1</s>", "answer 2</s>"],
        ["answer 2</s>", "answer 1</s>"],
        ["answer 3</s>", "answer 2</s>"],
    ]
    assert all(f"{n} ?" in text for n, sequence in enumerate(found, start=1) for text, _ in sequence)
    marks = SourceArrays(Path(source.folder)).marks
    assert marks is not None
    assert marks.tolist() == [1.0, 0.0, 1.0]
    assert any("2 good and 1 bad answers" in message for _, message in workshop.messages)


def rated(row: str) -> dict[str, Any]:
    """`a1`: the answer 1 to the prompt a; every other answer is a good one."""
    return {"prompt": row[0], "completion": row[1], "label": row[1] in "135"}


def answers_beside(workshop: Any) -> list[str]:
    """Prompt, answer, and the answer that stands beside it, of each row: `a1 1 2`."""
    [source] = workshop.prepare(KTO).train
    found = []
    for (whole, own), (same_prompt, other) in documents(workshop, source):
        prompt = whole.removesuffix(f"\n{own}").removesuffix("<|im_end|>\n<|im_start|>assistant").rpartition("\n")[2]
        assert same_prompt.startswith(whole.removesuffix(own))
        found.append(f"{prompt} {own} {other}".replace("</s>", ""))
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param("a1 a2 b3 b4 b5 a6", ["a 1 3", "a 2 3", "b 3 2", "b 4 2", "b 5 2", "a 6 5"], id="groups"),
        pytest.param("a1 b2 a3 b4", ["a 1 2", "b 2 1", "a 3 2", "b 4 3"], id="in turn"),
        pytest.param("a1 a2 a3 b4", ["a 1 4", "a 2 4", "a 3 4", "b 4 3"], id="a last row alone"),
    ],
)
def test_the_answer_beside_is_of_the_nearest_row_with_another_prompt(
    rows: str, expected: list[str], workshop: Any
) -> None:
    workshop.write("train.jsonl", [rated(row) for row in rows.split()])
    assert answers_beside(workshop) == expected


def test_another_prompt_is_looked_for_beyond_the_rows_that_are_read_together(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainers.data.readers.CHUNK_ROWS", 2)
    workshop.write("train.jsonl", [rated(row) for row in ("a1", "a2", "a3", "b4", "b5")])
    assert answers_beside(workshop) == ["a 1 4", "a 2 4", "a 3 4", "b 4 3", "b 5 3"]


@pytest.mark.parametrize("another", [{"system": "Be brief."}, {"prompt": [*EARLIER, QUESTION]}])
def test_all_that_is_before_the_answer_is_its_prompt(another: dict[str, Any], workshop: Any) -> None:
    row = {"prompt": "one two", "completion": "three", "label": True}
    workshop.write("train.jsonl", [row, row | another | {"completion": "four", "label": False}])
    [source] = workshop.prepare(KTO).train
    found = [[own for _, own in sequence] for sequence in documents(workshop, source)]
    assert found == [["three</s>", "four</s>"], ["four</s>", "three</s>"]]


def test_no_answer_that_was_imported_from_pairs_is_taken_for_mismatched(workshop: Any) -> None:
    rows = [{"prompt": f"p{n}", "answers": [f"{n}a", f"{n}b", f"{n}c"], "ranking": [0, 1, 2]} for n in range(4)]
    judged = workshop.write("judged.jsonl", rows)
    to = workshop.folder / "train.jsonl"
    import_judgements(ToImport(source=judged, to=str(to), form="unpaired-preference", pairing="best-worst"))
    [source] = workshop.prepare(KTO).train
    found = [[own.removesuffix("</s>") for _, own in sequence] for sequence in documents(workshop, source)]
    assert len(found) == 8
    assert all(own[0] != other[0] for own, other in found)


def test_answers_to_one_prompt_alone_are_refused_before_anything_is_tokenized(workshop: Any) -> None:
    rows = [{"prompt": "one two", "completion": text, "label": True} for text in ("three", "four")]
    workshop.write("train.jsonl", rows)
    with pytest.raises(DataError, match=r"answers one prompt only.*add rows with another prompt") as caught:
        workshop.prepare(KTO)
    [problem] = caught.value.problems
    assert problem.path == "spec.data.train[0].source"
    workshop.write("train.jsonl", [rows[0], rows[1] | {"label": "good"}])
    with pytest.raises(DataError, match="is not a judgement") as caught:
        workshop.prepare(KTO)
    assert len(caught.value.problems) == 1


def test_a_label_that_is_no_judgement_is_another_column_to_supervised_fine_tuning(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"prompt": "a", "completion": "b", "label": "billing"}])
    assert workshop.prepare().train[0].num_rows == 1


def test_a_mismatched_answer_that_is_too_long_is_cut_and_nobodys_fault(workshop: Any) -> None:
    rows = [
        {"prompt": "one two " * 10, "completion": "x", "label": True},
        {"prompt": "y", "completion": "one two " * 12, "label": False},
    ]
    workshop.write("train.jsonl", rows)
    [source] = workshop.prepare(KTO).train
    lengths = np.diff(SourceArrays(Path(source.folder)).offsets)
    assert source.num_rows == 2
    assert lengths.max() == 64


@pytest.mark.parametrize(("policy", "kept"), [("drop", 1), ("truncate", 2)])
def test_a_pair_is_kept_or_dropped_as_one_and_its_margin_with_it(policy: str, kept: int, workshop: Any) -> None:
    long = PAIR | {"rejected": "one two three " * 30, "margin": 1.0}
    workshop.write("train.jsonl", [long, PAIR | {"margin": 2.0}])
    [source] = workshop.prepare({"method": {"reward": {"maxSeqLength": 64, "longRows": policy}}}).train
    arrays = SourceArrays(Path(source.folder))
    assert (source.num_rows, source.num_sequences, source.num_rows_dropped) == (kept, kept, 2 - kept)
    assert arrays.marks is not None
    assert arrays.marks.tolist() == [1.0, 2.0][-kept:]
    assert np.diff(arrays.offsets).max() <= 64


def test_methods_that_learn_from_pairs_share_one_cache_entry(workshop: Any) -> None:
    workshop.write("train.jsonl", [PAIR])
    folders = {
        workshop.prepare({"method": {method: {"maxSeqLength": 64}}}).train[0].folder
        for method in ("dpo", "reward", "orpo")
    }
    longer = workshop.prepare({"method": {"dpo": {"maxSeqLength": 65}}}).train[0].folder
    assert len(folders) == 1
    assert longer not in folders


def batches(workshop: Any, world_size: int, rows: slice = slice(None)) -> Iterator[Batch]:
    prepared = workshop.prepare(DPO)
    for rank in range(world_size):
        yield from batches_in_order(prepared.train, 2, world_size, rank, rows)


def test_a_batch_says_whose_documents_it_holds(workshop: Any) -> None:
    workshop.write("train.jsonl", [PAIR | {"margin": float(n), "prompt": str(n)} for n in range(5)])
    found = list(batches(workshop, 2))
    assert [batch.slots for batch in found] == [((0, 0), (0, 1)), ((0, 4),), ((0, 2), (0, 3)), ()]
    assert [len(batch.cu_seqlens) - 1 for batch in found] == [4, 2, 4, 1]
    assert found[0].marks is not None
    assert found[0].marks.tolist() == [0.0, 1.0]
    assert found[-1].marks is None


def test_one_document_of_each_sequence_can_be_asked_for(workshop: Any) -> None:
    workshop.write("train.jsonl", [PAIR, PAIR | {"prompt": "another"}])
    [both], [first] = batches(workshop, 1), batches(workshop, 1, slice(0, 1))
    assert len(both.cu_seqlens) == 5
    assert len(first.cu_seqlens) == 3
    length = int(both.cu_seqlens[1])
    assert both.input_ids[0, :length].tolist() == first.input_ids[0, :length].tolist()
    assert (first.labels != IGNORED).sum() < (both.labels != IGNORED).sum()


@pytest.mark.parametrize(
    ("changes", "rows", "references"),
    [
        pytest.param(DPO, [PAIR, PAIR], ["three", "three"], id="the better answers of pairs"),
        pytest.param(
            KTO,
            [{"prompt": "p", "completion": word, "label": word == "good"} for word in ("bad", "good")],
            ["good"],
            id="the good ones among single answers",
        ),
    ],
)
def test_generated_answers_are_compared_with_good_ones(
    changes: dict[str, Any], rows: list[Any], references: list[str], workshop: Any
) -> None:
    for name in ("train.jsonl", "eval.jsonl"):
        workshop.write(name, rows)
    plan = workshop.plan(changes | {"data.eval": [{"source": "file://./eval.jsonl"}]})
    assert [prompt.reference for prompt in eval_prompts(plan, workshop.model, 10)] == references


def test_rows_are_json_that_people_write() -> None:
    """The rows of the module's page, as they stand there."""
    line = '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5}'
    assert isinstance(read(json.loads(line)), Preference)
