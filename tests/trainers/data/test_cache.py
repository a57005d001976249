"""An entry of the cache is complete and undamaged, or it is made again."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainers.data.cache import SourceArrays, SourceWriter, read_manifest
from finetune_trainers.data.packing import one_row_each
from finetune_trainers.data.prepare import prepare_data
from finetune_trainers.errors import DataError, StorageError

ROWS = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(20)]


@pytest.fixture
def entry(workshop: Any) -> Path:
    workshop.write("train.jsonl", ROWS)
    return Path(workshop.prepare().train[0].folder)


def test_the_same_data_is_read_from_the_cache_the_second_time(workshop: Any, entry: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in entry.iterdir()}
    again = workshop.prepare().train[0]
    assert again.from_cache
    assert Path(again.folder) == entry
    assert {file: file.stat().st_mtime_ns for file in entry.iterdir()} == before


def test_a_moved_file_is_the_same_data(workshop: Any, entry: Path) -> None:
    workshop.write("elsewhere/copy.jsonl", ROWS)
    assert workshop.prepare({"data.train.0.source": "file://./elsewhere/copy.jsonl"}).train[0].from_cache


@pytest.mark.parametrize(
    "changes",
    [
        {"method.sft.maxSeqLength": 65},
        {"method.sft.packing": False},
        {"method.sft.lossOn": "all"},
        {"method.sft.longRows": "drop"},
        {"training.seed": 5},
        {"data.train.0.maxRows": 19},
        {"data.train.0.format": "prompt-completion"},
    ],
    ids=str,
)
def test_whatever_shapes_the_entry_makes_another(workshop: Any, entry: Path, changes: dict[str, Any]) -> None:
    other = workshop.prepare(changes).train[0]
    assert not other.from_cache
    assert Path(other.folder) != entry


def test_other_contents_another_template_or_tokenizer_make_another_entry(
    workshop: Any, entry: Path, smol_folder: Path
) -> None:
    workshop.with_template("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    by_template = workshop.prepare().train[0]
    workshop.model = workshop.model.model_copy(update={"tokenizer_folder": str(smol_folder)})
    by_tokenizer = workshop.prepare({"method.sft.maxSeqLength": 512}).train[0]
    workshop.write("train.jsonl", ROWS[:-1])
    by_contents = workshop.prepare({"method.sft.maxSeqLength": 512}).train[0]
    folders = {str(entry), by_template.folder, by_tokenizer.folder, by_contents.folder}
    assert len(folders) == 4


@pytest.mark.parametrize("name", ["tokens.npy", "trained.npy", "offsets.npy", "bin_rows.npy", "sequence_tokens.npy"])
@pytest.mark.parametrize("damage", ["a byte is changed", "the end is missing", "the file is missing"])
def test_a_damaged_entry_is_made_again(workshop: Any, entry: Path, name: str, damage: str) -> None:
    file = entry / name
    content = file.read_bytes()
    if damage == "the file is missing":
        file.unlink()
    elif damage == "the end is missing":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = workshop.prepare().train[0]
    assert not again.from_cache
    assert file.read_bytes() == content
    assert sorted(path.name for path in entry.parent.iterdir()) == [entry.name]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": 99'])
def test_an_entry_with_a_damaged_manifest_is_made_again(workshop: Any, entry: Path, content: bytes) -> None:
    (entry / "manifest.json").write_bytes(content)
    assert not workshop.prepare().train[0].from_cache


def test_an_interrupted_preparation_leaves_nothing_behind(workshop: Any) -> None:
    workshop.write("train.jsonl", ROWS)

    def interrupt(percent: float, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(workshop.plan(), workshop.model, workshop.cache, interrupt)
    assert not list((workshop.cache / "data").iterdir())


def write_entry(folder: Path, num_rows: int) -> bool:
    lengths = np.full(num_rows, 3, dtype=np.int64)
    with SourceWriter(folder) as writer:
        writer.append(np.arange(num_rows * 3, dtype=np.int32), np.tile([False, True, True], num_rows), lengths)
        writer.publish(one_row_each(num_rows), capacity=3, num_rows=num_rows, num_rows_dropped=0, notes=[])
    return read_manifest(folder) is not None


def test_two_processes_may_write_the_same_entry_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "entry"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        whole = pool.starmap(write_entry, [(folder, 100)] * 8)
    assert all(whole)
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]


def test_an_entry_that_appeared_meanwhile_is_used_and_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "entry"
    write_entry(folder, 10)
    inode = folder.stat().st_ino
    write_entry(folder, 10)
    assert folder.stat().st_ino == inode
    assert [path.name for path in folder.parent.iterdir()] == ["entry"]


def test_arrays_come_back_as_they_were_appended(tmp_path: Path) -> None:
    with SourceWriter(tmp_path / "entry") as writer:
        for start in (0, 5):
            writer.append(
                np.arange(start, start + 5, dtype=np.int32),
                np.array([False, True, False, True, True]),
                np.array([2, 3], dtype=np.int64),
            )
        bins = (np.array([1, 3, 0, 2]), np.array([0, 2, 4]))
        manifest = writer.publish(bins, capacity=6, num_rows=4, num_rows_dropped=1, notes=["a note"])
    arrays = SourceArrays(tmp_path / "entry")
    assert arrays.tokens.tolist() == list(range(10))
    assert arrays.offsets.tolist() == [0, 2, 5, 7, 10]
    assert arrays.rows_of(0) == [(2, 5), (7, 10)]
    assert arrays.sequence_tokens.tolist() == [6, 4]
    assert arrays.sequence_trained.tolist() == [4, 2]
    assert manifest.packing_efficiency == 10 / 12
    assert json.loads((tmp_path / "entry" / "manifest.json").read_text())["notes"] == ["a note"]


def test_workers_say_what_they_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read as prepared data"):
        SourceArrays(tmp_path)


def test_faulty_data_is_not_remembered(workshop: Any) -> None:
    workshop.write("train.jsonl", [*ROWS, {"prompt": "q"}])
    for _ in range(2):
        with pytest.raises(DataError, match="has no column 'completion'"):
            workshop.prepare()
