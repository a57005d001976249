"""One JSON object a line on standard error, with the job that it is about.

`__main__` calls `configure` once. Whoever begins to work on a job says so with `about`; every line logged inside, also
by code that knows nothing of jobs, then carries its namespace, name and attempt.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

__all__ = ["JsonFormatter", "about", "configure"]

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039 - nobody changes it
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


@contextmanager
def about(**fields: str | int | None) -> Iterator[None]:
    """Adds `fields` (job, namespace, attempt) to every line of this task until the block ends; None leaves one out."""
    token = _about.set({**_about.get(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _about.reset(token)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; then the job; then what was given as `extra`; then the error.

    Names with an underscore are what libraries note for themselves on every record of a process: Ray does.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line. A value that JSON does not know is written as its text."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_about.get(),
            **{name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD and name[0] != "_"},
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(level: int | str = logging.INFO, stream: TextIO | None = None) -> None:
    """Sends everything that is logged to `stream` (standard error) as JSON, warnings of Python included."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
