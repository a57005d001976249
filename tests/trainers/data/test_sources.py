"""Every place and every kind of file gives the same rows."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune_trainers.prepared import PreparedSource

ROWS = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(5)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink, row_group_size=2)
    return sink.getvalue()


def prepared(workshop: Any, source: str, **fields: Any) -> PreparedSource:
    train: list[PreparedSource] = workshop.prepare({"data.train": [{"source": source, **fields}]}).train
    return train[0]


@pytest.fixture
def expected(workshop: Any) -> tuple[int, int, int]:
    """Figures of the five rows."""
    return figures(prepared(workshop, workshop.write("expected.jsonl", JSONL)))


def figures(source: PreparedSource) -> tuple[int, int, int]:
    return source.num_rows, source.num_tokens, source.num_trained_tokens


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.jsonl", JSONL, id="jsonl"),
        pytest.param("a.jsonl", "\ufeff" + JSONL, id="jsonl with a byte order mark"),
        pytest.param("a.jsonl", JSONL.replace("\n", "\r\n\n").strip(), id="jsonl with CRLF and blank lines"),
        pytest.param("a.json", json.dumps(ROWS, indent=2), id="json with a list"),
        pytest.param("a.json", JSONL, id="json with a row a line"),
        pytest.param("a.parquet", parquet(), id="parquet"),
        pytest.param("a.csv", CSV, id="csv"),
        pytest.param("a.csv", "\ufeff" + CSV.replace("\n", "\r\n"), id="csv as spreadsheets write it"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(
    workshop: Any, expected: tuple[int, int, int], name: str, content: str | bytes
) -> None:
    assert figures(prepared(workshop, workshop.write(name, content))) == expected


def lay_out_parts(workshop: Any) -> None:
    lines = JSONL.splitlines(keepends=True)
    workshop.write("parts/b/2.jsonl", "".join(lines[3:]))
    workshop.write("parts/1.jsonl", "".join(lines[:3]))
    workshop.write("parts/README.md", "# About this data")
    workshop.write("parts/.cache/3.jsonl", lines[0])


@pytest.mark.parametrize("source", ["file://./parts", "file://./parts/**/[12].jsonl"])
def test_a_folder_or_a_glob_is_the_rows_of_its_files(
    workshop: Any, expected: tuple[int, int, int], source: str
) -> None:
    lay_out_parts(workshop)
    assert figures(prepared(workshop, source)) == expected


def test_an_absolute_glob_is_found_too(workshop: Any, expected: tuple[int, int, int]) -> None:
    lay_out_parts(workshop)
    assert figures(prepared(workshop, f"file://{workshop.folder}/parts/**/[12].jsonl")) == expected


def test_a_claim_is_a_folder_below_the_mount_root(
    workshop: Any, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(workshop.folder / "claims"))
    workshop.write("claims/team-a/data/a.jsonl", JSONL)
    assert figures(prepared(workshop, "pvc://team-a/data")) == expected


def test_a_resource_of_a_package_is_found_without_importing_the_package(
    workshop: Any, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.write("lib/some_data_package/__init__.py", "raise RuntimeError('imported')")
    workshop.write("lib/some_data_package/inner/__init__.py", "raise RuntimeError('imported')")
    workshop.write("lib/some_data_package/inner/rows/a.jsonl", JSONL)
    monkeypatch.syspath_prepend(workshop.folder / "lib")
    assert figures(prepared(workshop, "package://some_data_package.inner/rows/a.jsonl")) == expected
    assert "some_data_package" not in sys.modules


def test_max_rows_takes_the_first_rows_over_all_files(workshop: Any) -> None:
    lay_out_parts(workshop)
    assert prepared(workshop, "file://./parts", maxRows=4).num_rows == 4


def test_csv_fields_may_hold_line_breaks_and_faults_after_them_keep_their_lines(workshop: Any) -> None:
    from finetune_trainers.errors import DataError

    uri = workshop.write("a.csv", 'prompt,completion\n"q\nq","a\na"\nq,\n')
    with pytest.raises(DataError, match=r"a\.csv:5: completion: is empty"):
        prepared(workshop, uri)


@pytest.fixture
def hub(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot as the Hub's client leaves it in its cache, and no network."""
    pytest.importorskip("datasets")
    snapshot = "hub/datasets--team--numbers/snapshots/0123456789012345678901234567890123456789"
    workshop.write("hub/datasets--team--numbers/refs/main", snapshot.rsplit("/", 1)[1])
    workshop.write(f"{snapshot}/train.jsonl", JSONL)
    workshop.write(f"{snapshot}/test.jsonl", JSONL.splitlines(keepends=True)[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workshop.folder / "hub"))
    return Path(workshop.folder / snapshot)


def test_a_data_set_of_the_hub_is_read_from_the_hub_s_cache(
    workshop: Any, expected: tuple[int, int, int], hub: Path
) -> None:
    assert figures(prepared(workshop, "hf://team/numbers")) == expected
    assert prepared(workshop, "hf://team/numbers", split="test").num_rows == 1


def test_a_split_that_the_data_set_lacks_is_refused_with_those_it_has(workshop: Any, hub: Path) -> None:
    from finetune_trainers.errors import DataError

    with pytest.raises(DataError, match="is not a split of the data set; use train or test") as caught:
        prepared(workshop, "hf://team/numbers", split="validation")
    problem = caught.value.problems[0]
    assert (problem.path, problem.value) == ("spec.data.train[0].split", "validation")


def test_a_hub_repository_that_holds_no_data_is_refused(workshop: Any, hub: Path) -> None:
    from finetune_trainers.errors import DataError

    for file in hub.iterdir():
        file.unlink()
    (hub / "notes.docx").write_bytes(b"x")
    with pytest.raises(DataError, match="not a data set that can be read") as caught:
        prepared(workshop, "hf://team/numbers")
    assert caught.value.problems[0].path == "spec.data.train[0].source"


def test_a_bad_row_of_a_hub_data_set_is_named_by_split_and_number(workshop: Any, hub: Path) -> None:
    from finetune_trainers.errors import DataError

    (hub / "train.jsonl").write_text(JSONL + json.dumps({"prompt": "q", "completion": ""}) + "\n")
    with pytest.raises(DataError, match=r"hf://team/numbers\[train\]:6: completion: is empty"):
        prepared(workshop, "hf://team/numbers")
