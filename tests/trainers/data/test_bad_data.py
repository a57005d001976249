"""Bad data beyond single mistakes, which are rows of tests/bad_input: many at once, and files that fail on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec import DataSource
from finetune_trainers.data.faults import MAX_LISTED
from finetune_trainers.data.sources import find_files
from finetune_trainers.errors import DataError, StorageError

USER = {"role": "user", "content": "one two"}
ASSISTANT = {"role": "assistant", "content": "three four"}
GOOD = {"messages": [USER, ASSISTANT]}
LONG = {"messages": [{"role": "user", "content": "one two three " * 60}, ASSISTANT]}


def test_all_rows_are_checked_and_the_first_problems_listed_with_the_number_of_all(workshop: Any) -> None:
    rows = [GOOD if line % 2 else {"messages": [USER]} for line in range(1, 101)]
    workshop.write("train.jsonl", rows)
    workshop.write("eval.jsonl", [LONG])
    with pytest.raises(DataError, match=r"and 50 more problems") as caught:
        workshop.prepare({"data.eval": [{"source": "file://./eval.jsonl"}]})
    assert [problem.file for problem in caught.value.problems] == [
        f"train.jsonl:{line}" for line in range(2, 2 * MAX_LISTED + 1, 2)
    ]


def test_values_are_shortened_in_messages(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"text": ["word"] * 1000}])
    with pytest.raises(DataError) as caught:
        workshop.prepare()
    value = caught.value.problems[0].value
    assert value is not None
    assert len(value) == 80


def test_a_row_past_max_rows_is_not_even_read(workshop: Any) -> None:
    workshop.write("train.jsonl", [GOOD, GOOD, {"messages": []}])
    assert workshop.prepare({"data.train.0.maxRows": 2}).train[0].num_rows == 2


def test_a_file_that_may_not_be_read_is_named(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every file may be read, so the refusal is made here."""
    workshop.write("train.jsonl", [GOOD])

    def refuse(file: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("finetune_trainers.data.cache._digest", refuse)
    with pytest.raises(DataError, match=r"train.jsonl: spec.data.train\[0\].source: cannot be read: Permission denied"):
        workshop.prepare()


def test_a_file_that_breaks_off_while_it_is_read_is_named(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.write("train.jsonl", [GOOD])
    real_open = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "train.jsonl":
            raise OSError(5, "Input/output error", str(self))
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read: Input/output error"):
        workshop.prepare()


def test_a_cache_that_cannot_be_written_is_named(workshop: Any) -> None:
    workshop.write("train.jsonl", [GOOD])
    workshop.write("occupied", b"a file")
    workshop.cache = workshop.folder / "occupied" / "cache"
    with pytest.raises(StorageError, match="occupied/cache cannot be written"):
        workshop.prepare()


def test_hub_data_without_the_package_that_reads_it_says_what_to_install(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install 'datasets"):
        find_files(DataSource(source="hf://team/numbers"), "spec.data.train[0]")


def test_problems_are_plain_json(workshop: Any) -> None:
    workshop.write("train.jsonl", b"{]\n")
    with pytest.raises(DataError) as caught:
        workshop.prepare()
    document = caught.value.problems[0].to_document()
    assert json.loads(json.dumps(document))["file"] == "train.jsonl:1"
