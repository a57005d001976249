"""The output of a driver, which is all that is seen of it from elsewhere: log lines, and the job between them.

Written by `driver`, read by the backends that start one. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

__all__ = ["ATTEMPT_MARK", "JOB_MARK", "attempts_in", "lines_of", "newest_document"]

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
    marks = (line.removeprefix(ATTEMPT_MARK) for line in output.split("\n")[:-1] if line.startswith(ATTEMPT_MARK))
    return list(dict.fromkeys(int(number) for number in marks if number.isdecimal()))


def lines_of(output: str, attempt: int) -> Iterator[str]:
    """What that attempt's trainers have written, whole lines only."""
    now = None
    for line in output.split("\n")[:-1]:
        if line.startswith(ATTEMPT_MARK):
            now = line.removeprefix(ATTEMPT_MARK)
        elif now == str(attempt) and not line.startswith(JOB_MARK):
            yield line
