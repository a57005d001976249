"""The output of a driver, which is all that is seen of it from elsewhere: log lines, and the job between them.

Written by `driver`, read by the backends that start one. Pure.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["ATTEMPT_MARK", "JOB_MARK", "Reader", "attempts_in", "newest_document"]

JOB_MARK = "::finetune-job:: "
"""Before the job, as JSON, in a line of its own."""
ATTEMPT_MARK = "::finetune-attempt:: "
"""Before the number of the attempt that the following lines are of."""


def newest_document(output: str) -> dict[str, Any] | None:
    """The job as it was told last; None where it has not been. A line that is still being written does not count."""
    for line in reversed(output.split("\n")):
        if line.startswith(JOB_MARK):
            try:
                found: dict[str, Any] = json.loads(line.removeprefix(JOB_MARK))
            except ValueError:
                continue
            return found
    return None


def attempts_in(output: str) -> list[int]:
    """The attempts that have written something, in order."""
    reader = Reader()
    reader.read(output)
    return reader.attempts


class Reader:
    """Takes output piece by piece as it grows, and parts it by attempts. Pieces end anywhere, in a line too."""

    def __init__(self) -> None:
        self.attempts: list[int] = []
        """Those that have written something, in order."""
        self._rest = ""
        self._now: int | None = None

    def read(self, piece: str) -> list[tuple[int, str]]:
        """The lines that are whole by now and were not before, each with the attempt whose trainers have written it."""
        found: list[tuple[int, str]] = []
        *lines, self._rest = (self._rest + piece).split("\n")
        for line in lines:
            if line.startswith(ATTEMPT_MARK):
                self._begin(line.removeprefix(ATTEMPT_MARK))
            elif self._now is not None and not line.startswith(JOB_MARK):
                found.append((self._now, line))
        return found

    def _begin(self, number: str) -> None:
        self._now = int(number) if number.isdecimal() else None
        if self._now is not None and self._now not in self.attempts:
            self.attempts.append(self._now)
