"""Reading rows out of files, a chunk at a time, so that a file need not fit into memory. Called by `prepare`.

              what a row is                                                   its place in messages
    jsonl     one JSON object a line; blank lines are skipped                 file:line
    json      one of a list of objects (read whole), or JSON lines            file:number of the row
    parquet   read by batches of a row group                                  file:number of the row
    csv       header line, then records; UTF-8, comma, RFC 4180 quotes        file:line of the record
    txt       one document per file, read in blocks that end at a line break  file
    Hub       whatever the `datasets` library makes of the repository         hf://org/name[split]:number

A row that cannot be read becomes a fault with its place, and reading goes on; a file that cannot be read,
likewise.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainers.data.faults import Faults, clip, shorten
from finetune_trainers.data.formats import CONTINUES
from finetune_trainers.data.sources import DataFiles, FileKind, HubSplit

__all__ = ["CHUNK_ROWS", "Chunk", "read_chunks"]

CHUNK_ROWS = 1024
"""Rows handed on together. Enough to keep all cores busy, few enough that megabyte documents fit into
memory."""
CHUNK_BYTES = 4 * 2**20
"""A chunk also ends here, so that long documents do not pile up."""
TXT_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one file."""

    file: str
    numbers: list[int]
    """Line or row numbers from 1; 0 where the row is the whole file."""
    rows: list[Any]
    """A dict by column for a sound row; other JSON values come through as they are."""
    share: float
    """Part of the source that has been read with this chunk, 0 to 1."""

    def place(self, index: int) -> str:
        return f"{self.file}:{self.numbers[index]}" if self.numbers[index] else self.file


Rows = Iterator[tuple[int, Any, int]]
"""(line or row number, row, how far the file has been read; in bytes or rows)"""


def read_chunks(source: DataFiles, path: str, cache: Path, faults: Faults) -> Iterator[Chunk]:
    """Every row of `source`, in order. `path` is the source's field in the job, `cache` a folder for the Hub
    reader."""
    if source.hub is not None:
        yield from _read_hub(source.hub, path, cache, faults)
        return
    total = max(source.num_bytes, 1)
    bytes_before = 0
    for file in source.files:
        size = file.stat().st_size
        num_rows = 0
        try:
            for chunk, done in _in_chunks(_READERS[source.kind](file, faults)):
                numbers, rows = chunk
                num_rows += len(rows)
                yield Chunk(str(file), numbers, rows, (bytes_before + min(done, size)) / total)
        except OSError as error:
            faults.add(f"cannot be read: {error.strerror or error}", file=str(file))
        bytes_before += size


def _in_chunks(rows: Rows) -> Iterator[tuple[tuple[list[int], list[Any]], int]]:
    numbers: list[int] = []
    taken: list[Any] = []
    started_at = done = 0
    for number, row, done in rows:
        numbers.append(number)
        taken.append(row)
        if len(taken) >= CHUNK_ROWS or done - started_at >= CHUNK_BYTES:
            yield (numbers, taken), done
            numbers, taken, started_at = [], [], done
    if taken:
        yield (numbers, taken), done


def _read_jsonl(file: Path, faults: Faults) -> Rows:
    done = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            done += len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if not line.strip():
                continue
            place = f"{file}:{number}"
            text = _decode(line.rstrip(b"\r\n"), place, faults)
            if text is None:
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                _add_json_fault(error, text, place, faults)
                continue
            yield number, row, done


def _read_json(file: Path, faults: Faults) -> Rows:
    with file.open("rb") as stream:
        start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"{"):
        # Many data sets keep JSON lines under this name. One object over many lines is refused by its first
        # line.
        yield from _read_jsonl(file, faults)
        return
    content = file.read_bytes()
    text = _decode(content, str(file), faults)
    if text is None or not text.strip():
        return
    try:
        rows = json.loads(text.removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        _add_json_fault(error, text.splitlines()[line - 1], f"{file}:{line}", faults)
        return
    if not isinstance(rows, list):
        faults.add("must be a list of objects, or one object a line", file=str(file), value=shorten(rows))
        return
    for index, row in enumerate(rows):
        yield index + 1, row, len(content) * (index + 1) // len(rows)


def _read_csv(file: Path, faults: Faults) -> Rows:
    # The default limit of 128 kB a field is shorter than many documents; 2**31 - 1 is the most that every C
    # long holds.
    csv.field_size_limit(2**31 - 1)
    with file.open("rb") as raw:
        decoded = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(decoded, strict=True)
        columns = next(reader, [])
        if not _header_is_sound(columns, file, faults):
            return
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader, None)
            except csv.Error as error:
                # After a quote that is never closed nothing that follows can be trusted.
                faults.add(f"is not valid CSV: {error}; close the quote that is open", file=f"{file}:{line}")
                return
            if record is None:
                return
            if not record:
                continue
            if len(record) != len(columns):
                message = f"has {len(record)} fields, but the header has {len(columns)}; put commas into quotes"
                faults.add(message, file=f"{file}:{line}", value=clip(",".join(record)))
                continue
            if not all(_is_utf8(field) for field in record):
                found = clip(",".join(record).encode(errors="surrogateescape").decode(errors="replace"))
                faults.add("is not UTF-8 text; save the file as UTF-8", file=f"{file}:{line}", value=found)
                continue
            yield line, dict(zip(columns, record, strict=True)), raw.tell()


def _header_is_sound(columns: list[str], file: Path, faults: Faults) -> bool:
    if not columns:
        return False
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        faults.add("names a column twice in the header; rename one", file=f"{file}:1", value=clip(repeated[0]))
    if not all(_is_utf8(column) for column in columns):
        faults.add("is not UTF-8 text; save the file as UTF-8", file=f"{file}:1")
        return False
    return not repeated


def _is_utf8(text: str) -> bool:
    """False when surrogateescape had to stand in for a byte."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _read_txt(file: Path, faults: Faults) -> Rows:
    line = 1
    done = 0
    with file.open("rb") as stream:
        block = _txt_block(stream)
        while block:
            following = _txt_block(stream)
            done += len(block)
            text = _decode(block, str(file), faults, line)
            if text is None:
                return
            row = {"text": text.removeprefix("\ufeff") if line == 1 else text}
            if following:
                row[CONTINUES] = "yes"
            if text.strip() or (line == 1 and not following):
                yield 0, row, done
            line += block.count(b"\n")
            block = following


def _txt_block(stream: io.BufferedReader) -> bytes:
    """The next block up to a line break, which never lies inside a UTF-8 character."""
    return stream.read(TXT_BLOCK_BYTES) + stream.readline()


def _read_parquet(file: Path, faults: Faults) -> Rows:
    import pyarrow
    import pyarrow.parquet

    size = file.stat().st_size
    if not size:
        return
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=CHUNK_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row, size * number // max(table.metadata.num_rows, 1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        faults.add(f"is not a readable Parquet file: {_first_line(error)}; write it again", file=str(file))


def _read_hub(source: HubSplit, path: str, cache: Path, faults: Faults) -> Iterator[Chunk]:
    import datasets

    # Its bars go to stderr, where the run draws its own.
    datasets.disable_progress_bars()
    folder, split = str(source.folder), source.split
    try:
        splits = datasets.get_dataset_split_names(folder)
        if split not in splits:
            faults.add(
                f"is not a split of the data set; use {' or '.join(splits)}",
                path=f"{path}.split",
                value=split,
            )
            return
        rows = datasets.load_dataset(folder, split=split, cache_dir=str(cache))
    except Exception as error:  # the library raises its own, pyarrow's, pandas' and built-in errors alike
        faults.add(
            f"is not a data set that can be read: {_first_line(error)}",
            path=f"{path}.source",
            value=source.name,
        )
        return
    total = len(rows)
    for start in range(0, total, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, total)
        values = rows.with_format("arrow")[start:stop].to_pylist()
        yield Chunk(f"{source.name}[{split}]", list(range(start + 1, stop + 1)), values, stop / total)


_READERS: dict[FileKind, Callable[[Path, Faults], Rows]] = {
    FileKind.JSONL: _read_jsonl,
    FileKind.JSON: _read_json,
    FileKind.PARQUET: _read_parquet,
    FileKind.CSV: _read_csv,
    FileKind.TXT: _read_txt,
}


def _decode(content: bytes, place: str, faults: Faults, first_line: int | None = None) -> str | None:
    """`content` as text, or None after reporting the first byte that is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if first_line is not None:
            place = f"{place}:{first_line + content.count(bytes([10]), 0, error.start)}"
        around = content[max(error.start - 20, 0) : error.start + 20].decode(errors="replace")
        message = f"is not UTF-8 text: byte 0x{content[error.start]:02x}; save the file as UTF-8"
        faults.add(message, file=place, value=clip(around))
        return None


def _add_json_fault(error: Exception, line: str, place: str, faults: Faults) -> None:
    if isinstance(error, json.JSONDecodeError):
        message = f"is not valid JSON: {error.msg} at column {error.colno}; one JSON object a line is right"
    else:
        message = "is nested too deeply for JSON data; a row is one object with columns"
    faults.add(message, file=place, value=clip(line.strip()))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
