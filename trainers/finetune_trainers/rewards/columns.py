"""Whether the rows have the columns that rewards compare answers with. Asked by the launcher when the data is prepared:
before a worker starts, not when the first answers have been written."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from finetune_api.failures import Problem
from finetune_api.problems import shorten
from finetune_trainers.data.cache import SourceArrays
from finetune_trainers.prepared import PreparedData, PreparedSource

__all__ = ["Needed", "check_columns"]

_MOST_LISTED = 20


class Needed(NamedTuple):
    """A column that a reward cannot do without."""

    column: str
    path: str
    """The reward's field that asks for it."""
    value: str
    """What stands there."""


def check_columns(needed: Sequence[Needed], data: PreparedData) -> list[Problem]:
    """What `needed` finds in no row of the training or of the evaluation data. In a mixture it is enough that one
    source has a column: the reward has no opinion of rows without it. Raises StorageError."""
    problems: list[Problem] = []
    for part, sources in (("spec.data.train", data.train), ("spec.data.eval", data.eval)):
        there = _columns(sources, {one.column for one in needed})
        for one in needed if sources else ():
            if one.column not in there:
                message = _message(one.column, part, sorted(there))
                problems.append(Problem(path=one.path, value=shorten(one.value), message=message))
    return problems


def _columns(sources: Sequence[PreparedSource], wanted: set[str]) -> set[str]:
    """Columns of the rows, read until all that are `wanted` have been seen."""
    seen: set[str] = set()
    for source in sources:
        arrays = SourceArrays(Path(source.folder))
        for row in range(arrays.num_sequences):
            if wanted <= seen:
                return seen
            seen |= arrays.kept(row)["fields"].keys()
    return seen


def _message(column: str, part: str, there: Sequence[str]) -> str:
    listed = ", ".join(there[:_MOST_LISTED]) or "none"
    more = f" and {len(there) - _MOST_LISTED} more" if len(there) > _MOST_LISTED else ""
    close = difflib.get_close_matches(column, there, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"needs column {column}, which no row of {part} has; they have: {listed}{more}{hint}"
