"""Rows of a source with their places, and what is in them. Called by `importing`, `judging` and `candidates`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from finetune_api.spec import DataFormat, DataSource
from finetune_trainers.data.faults import Faults, RowError, shorten
from finetune_trainers.data.formats import OPTIONAL, REQUIRED, RowFormat
from finetune_trainers.data.readers import read_chunks
from finetune_trainers.data.sources import DataFiles, find_files
from finetune_trainers.data.turns import Message, Prompt, required_text
from finetune_trainers.errors import DataError

__all__ = [
    "Names",
    "Row",
    "as_written",
    "every_row",
    "files_of",
    "names_for",
    "number",
    "numbers",
    "prompt_of",
    "texts",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in a file."""

    place: str
    """file:line."""
    columns: dict[str, Any]


class Names:
    """What columns are called in the data, by their own names."""

    def __init__(self, given: Mapping[str, str], known: Sequence[str]) -> None:
        """Raises DataError for a name that is none of `known`."""
        for name in given:
            if name not in known:
                raise DataError(f"--column: {name} is none of the columns here, which are {', '.join(known)}")
        self._given = dict(given)

    def __getitem__(self, name: str) -> str:
        return self._given.get(name, name)

    def are_in(self, row: Row, *names: str) -> bool:
        return all(self[name] in row.columns for name in names)

    def value(self, row: Row, name: str) -> Any:
        """What stands in column `name`. Raises RowError where there is none."""
        if self[name] not in row.columns:
            listed = ", ".join(map(str, row.columns)) or "none"
            raise RowError(f"has no column {self[name]!r}; the columns are {listed}", self[name])
        return row.columns[self[name]]


def names_for(names: Names, form: DataFormat) -> RowFormat:
    """The format with these names."""
    return RowFormat(form, {name: names[name] for name in (*REQUIRED[form], *OPTIONAL.get(form, ()))})


def files_of(source: str) -> DataFiles:
    """The files of a source. Raises DataError."""
    return find_files(DataSource(source=source), "SOURCE")


def every_row(files: DataFiles, read: Callable[[Row], T], limit: int | None = None) -> Iterator[T]:
    """What `read` makes of each row; RowErrors are collected, and all of them raised as one DataError behind the last
    row, like what no row could be made of."""
    faults = Faults()
    num_read = 0
    with TemporaryDirectory(prefix="finetune-data-") as scratch:
        for chunk in read_chunks(files, "SOURCE", Path(scratch), faults):
            for index, columns in enumerate(chunk.rows):
                if num_read == limit:
                    faults.raise_if_any()
                    return
                num_read += 1
                try:
                    if not isinstance(columns, dict):
                        raise RowError("is not an object with columns", value=shorten(columns))
                    found = read(Row(chunk.place(index), columns))
                except RowError as error:
                    faults.add_row(chunk.place(index), error)
                else:
                    if not faults.num_found:
                        yield found
    faults.raise_if_any()
    if not num_read:
        raise DataError(f"{files.hub.name if files.hub else files.files[0]}: has no rows")


def prompt_of(row: Row, names: Names) -> Prompt:
    """The row's conversation up to the user's message, and its other columns. Raises RowError."""
    form = names_for(names, DataFormat.PROMPT)
    found = form.read(row.columns)
    assert isinstance(found, Prompt)
    return found


def texts(value: Any, name: str, least: int = 1) -> list[str]:
    """The answers in column `name`: a list of texts, or in a CSV file such a list as JSON. Raises RowError."""
    value = _list(value, name)
    if len(value) < least:
        raise RowError(f"must hold at least {least} answers", name, f"{len(value)}")
    return [required_text(one, f"{name}[{index}]") for index, one in enumerate(value)]


def numbers(value: Any, name: str, count: int) -> list[float]:
    """The `count` numbers in column `name`. Raises RowError."""
    value = _list(value, name)
    if len(value) != count:
        raise RowError(f"must hold one number for each of the {count} answers", name, f"{len(value)} numbers")
    return [number(one, f"{name}[{index}]") for index, one in enumerate(value)]


def number(value: Any, path: str) -> float:
    """A finite number, also as the text that CSV has. Raises RowError."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowError("must be a number", path, shorten(value)) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError("must be a number", path, shorten(value))
    return float(value)


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("must be a list; this is not valid JSON", name, shorten(value)) from None
    if not isinstance(value, list):
        raise RowError("must be a list", name, shorten(value))
    return value


def as_written(prompt: Sequence[Message]) -> str | list[Message]:
    """A prompt as it is written: the text of a single user's message, or messages."""
    if len(prompt) == 1 and set(prompt[0]) == {"role", "content"}:
        return prompt[0]["content"]
    return list(prompt)
