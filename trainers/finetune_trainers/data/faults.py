"""Collecting everything that is wrong with a job's data, so that a person mends it in one go.

Readers, formats and the tokenizer report here; `prepare` raises what was collected once all rows were seen.
"""

from __future__ import annotations

import json
from typing import Any

from finetune_api.failures import Problem
from finetune_trainers.errors import DataError

__all__ = ["MAX_LISTED", "Faults", "RowError", "clip", "shorten"]

MAX_LISTED = 20
MAX_VALUE_LENGTH = 80


class RowError(Exception):
    """One row that cannot be used. `path` is the field inside the row, `value` what was found there."""

    def __init__(self, message: str, path: str | None = None, value: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.value = value


class Faults:
    """The first `MAX_LISTED` problems, and the number of all."""

    def __init__(self) -> None:
        self.listed: list[Problem] = []
        self.num_found = 0

    def add(self, message: str, *, file: str | None = None, path: str | None = None, value: str | None = None) -> None:
        self.num_found += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(Problem(file=file, path=path, value=value, message=message))

    def add_row(self, place: str, fault: RowError) -> None:
        self.add(fault.message, file=place, path=fault.path, value=fault.value)

    def raise_if_any(self) -> None:
        """Raise a DataError whose message is the first problem and the number of the others."""
        if not self.num_found:
            return
        others = self.num_found - 1
        more = f" (and {others} more {'problem' if others == 1 else 'problems'})" if others else ""
        raise DataError(f"{self.listed[0]}{more}", self.listed)


def shorten(value: Any) -> str:
    """`value` as JSON where it is JSON, in at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return clip(text)


def clip(text: str) -> str:
    """`text` in at most 80 characters, as it stands; what cannot be printed is escaped."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 1] + "…"
