"""People's judgements on disk become a data set that methods learn from."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.preference_data import ImportReport, ToImport
from finetune_api.spec import DataFormat, DataSource
from finetune_trainers.data.faults import Faults
from finetune_trainers.data.formats import choose_format
from finetune_trainers.data.readers import read_chunks
from finetune_trainers.data.sources import find_files
from finetune_trainers.errors import DataError, UserError
from finetune_trainers.preference_data.importing import import_judgements

RATINGS = [
    {"prompt": "q", "answers": ["good", "fair", "poor"], "ratings": [5, 4, 1]},
    {"prompt": "r", "answers": ["one", "two"], "ratings": [3, 3]},
]


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def bring_in(tmp_path: Path, rows: list[Any], **asked: Any) -> tuple[list[dict[str, Any]], ImportReport]:
    """What is written for `rows`."""
    source = write(tmp_path / "said.jsonl", rows)
    to = tmp_path / "out" / "prefs.jsonl"
    report = import_judgements(ToImport(source=f"file://{source}", to=str(to), **asked))
    return [json.loads(line) for line in to.read_text().splitlines()], report


def couples(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['chosen']}>{row['rejected']}" for row in rows]


def test_pairs_keep_their_margin_and_lose_what_is_repeated_or_contradicted(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}
    turned = {"prompt": "r", "chosen": "d", "rejected": "c"}
    rows, report = bring_in(
        tmp_path, [pair, pair, turned, {**turned, "chosen": "c", "rejected": "d"}, {**turned, "prompt": "s"}]
    )
    assert rows == [pair | {"margin": 2.0}, {"prompt": "s", "chosen": "d", "rejected": "c"}]
    assert (report.layout, report.rows_read, report.prompts) == ("pairs", 5, 3)
    assert (report.repeated, report.contradicted) == (1, 2)


def test_whole_conversations_become_a_prompt_and_two_answers(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    whole = {
        "chosen": [*asked, {"role": "assistant", "content": "a"}],
        "rejected": [*asked, {"role": "assistant", "content": "b"}],
    }
    assert bring_in(tmp_path, [whole])[0] == [{"prompt": asked, "chosen": "a", "rejected": "b"}]


def test_ratings_become_pairs_ties_are_counted_and_margins_are_differences(tmp_path: Path) -> None:
    rows, report = bring_in(tmp_path, RATINGS, margins=True)
    assert couples(rows) == ["good>fair", "good>poor", "fair>poor"]
    assert [row["margin"] for row in rows] == [1.0, 4.0, 3.0]
    assert (report.layout, report.ties) == ("ratings", 1)
    assert report.data.rows == 3


def test_ratings_nearer_than_the_least_gap_are_ties(tmp_path: Path) -> None:
    rows, report = bring_in(tmp_path, RATINGS, min_gap=2)
    assert couples(rows) == ["good>poor", "fair>poor"]
    assert report.ties == 2


def test_a_row_for_each_rating_is_gathered_by_prompt_and_several_people_have_their_mean(tmp_path: Path) -> None:
    table = tmp_path / "ratings.csv"
    with table.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["question", "answer", "rating"])
        lines.writerows([["q", "a", 5], ["r", "x", 1], ["q", "b", 3], ["q", "a", 2], ["q", "b", "3.25"], ["r", "y", 2]])
    to = tmp_path / "prefs.jsonl"
    asked = ToImport(source=f"file://{table}", to=str(to), columns={"prompt": "question"}, margins=True)
    report = import_judgements(asked)
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert couples(rows) == ["a>b", "y>x"]
    assert rows[0]["margin"] == 0.375, "3.5 and 3.125"
    assert (report.rows_read, report.prompts) == (6, 2)


def test_rankings_are_best_first_and_shared_ranks_are_ties(tmp_path: Path) -> None:
    ranked = {"prompt": "q", "answers": ["a", "b", "c"]}
    assert couples(bring_in(tmp_path, [ranked], pairing="adjacent")[0]) == ["a>b", "b>c"]
    rows, report = bring_in(tmp_path, [ranked | {"ranks": [2, 1, 2]}], overwrite=True)
    assert couples(rows) == ["b>a", "b>c"]
    assert (report.layout, report.ties) == ("rankings", 1)


@pytest.mark.parametrize(
    ("rows", "more", "wanted"),
    [
        (RATINGS, {"good_from": 4, "bad_to": 1}, [("good", True), ("fair", True), ("poor", False)]),
        ([{"prompt": "q", "answers": ["a", "b", "c"]}], {}, [("a", True), ("c", False)]),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], {}, [("a", True), ("b", False)]),
    ],
)
def test_kto_gets_good_and_bad_answers(
    tmp_path: Path, rows: list[Any], more: dict[str, Any], wanted: list[tuple[str, bool]]
) -> None:
    found, _ = bring_in(tmp_path, rows, form="unpaired-preference", **more)
    assert [(row["completion"], row["label"]) for row in found] == wanted


@pytest.mark.parametrize(
    ("form", "more"),
    [("preference", {}), ("unpaired-preference", {"good_from": 4, "bad_to": 3})],
)
def test_what_is_written_is_read_as_that_format(tmp_path: Path, form: str, more: dict[str, Any]) -> None:
    bring_in(tmp_path, RATINGS, form=form, **more)
    source = DataSource(source=f"file://{tmp_path}/out")
    faults = Faults()
    [chunk] = read_chunks(find_files(source, "data"), "data", tmp_path, faults)
    read = choose_format(source, chunk.rows[0], {DataFormat(form)})
    assert [read.read(row) for row in chunk.rows]
    assert not faults.num_found


def test_what_it_was_made_of_stands_beside_it(tmp_path: Path) -> None:
    _, report = bring_in(tmp_path, RATINGS, min_gap=2)
    told = json.loads(Path(report.data.provenance).read_text())
    said = tmp_path / "said.jsonl"
    assert told["sources"] == [
        {
            "file": str(said),
            "bytes": said.stat().st_size,
            "digest": f"sha256:{hashlib.sha256(said.read_bytes()).hexdigest()}",
        }
    ]
    assert told["data"]["digest"] == f"sha256:{hashlib.sha256(Path(report.data.path).read_bytes()).hexdigest()}"
    assert told["settings"]["minGap"] == 2
    assert told["counts"]["ties"] == report.ties
    assert told["madeBy"].startswith("finetune data import, finetune-operator ")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "q", "answers": ["a", "b"], "ratings": [1]},
            "ratings: must hold one number for each of the 2 answers",
        ),
        ({"prompt": "q", "answers": ["a", "b"], "ratings": [1, "x"]}, "ratings[1]: must be a number"),
        ({"prompt": "q", "answers": ["a", " "], "ratings": [1, 2]}, "answers[1]: is empty"),
        ({"prompt": "q", "answers": "a", "ratings": [1]}, "answers: must be a list"),
        ({"prompt": None, "answers": ["a", "b"], "ratings": [1, 2]}, "prompt: is missing; it must be text"),
        ({"prompt": "q", "answers": ["a", "b"]}, "has no column 'ratings'"),
        ("{broken", "is not valid JSON"),
        ([1], "is not an object with columns"),
    ],
)
def test_every_row_that_cannot_be_read_is_named_and_nothing_is_written(tmp_path: Path, row: Any, said: str) -> None:
    source = write(tmp_path / "said.jsonl", [*RATINGS, row, RATINGS[0], row])
    to = tmp_path / "prefs.jsonl"
    with pytest.raises(DataError) as refused:
        import_judgements(ToImport(source=f"file://{source}", to=str(to)))
    files = [problem.file for problem in refused.value.problems]
    assert files == [f"{source}:3", f"{source}:5"]
    assert said in str(refused.value.problems[0])
    assert not to.exists()


@pytest.mark.parametrize(
    ("rows", "asked", "said"),
    [
        ([{"text": "a"}], {}, "holds no judgement that is known: the columns are text"),
        (RATINGS, {"columns": {"colour": "x"}}, "--column: colour is none of the columns here"),
        (RATINGS, {"form": "unpaired-preference"}, "ratings become good and bad answers by --good-from and --bad-to"),
        (RATINGS, {"form": "unpaired-preference", "good_from": 3}, "go together"),
        (RATINGS, {"form": "unpaired-preference", "good_from": 3, "bad_to": 3}, "must be below --good-from"),
        (RATINGS, {"good_from": 4, "bad_to": 2}, "are for --as unpaired-preference"),
        (RATINGS[1:], {}, "no row is left to be written"),
        ([{"prompt": "q", "answers": ["a", "a"]}], {}, "holds an answer twice"),
        ([{"prompt": "q", "answers": ["a", "b"]}], {"margins": True}, "these are rankings; leave it out"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    tmp_path: Path, rows: list[Any], asked: dict[str, Any], said: str
) -> None:
    with pytest.raises((DataError, UserError), match=said):
        bring_in(tmp_path, rows, **asked)
    assert not (tmp_path / "out" / "prefs.jsonl").exists()


def test_a_file_that_is_there_stays_unless_it_may_be_written_over(tmp_path: Path) -> None:
    bring_in(tmp_path, RATINGS)
    with pytest.raises(UserError, match="is there already; name a new file, or say --overwrite"):
        bring_in(tmp_path, RATINGS)
    assert len(bring_in(tmp_path, RATINGS, overwrite=True, pairing="best-worst")[0]) == 1
