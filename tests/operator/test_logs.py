"""Log lines are JSON objects that say which job they are about."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_operator import logs
from finetune_operator.logs import about

log = logging.getLogger("somewhere")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the lines go, until the test is over."""
    root, written = logging.getLogger(), io.StringIO()
    level, handlers = root.level, root.handlers[:]
    root.handlers = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.configure(stream=written)
        yield written
        logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_an_object(stream: io.StringIO) -> None:
    log.info("%d jobs", 3)
    log.debug("not shown")
    (line,) = lines(stream)
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "info", "logger": "somewhere", "message": "3 jobs"}


def test_what_a_library_notes_for_itself_on_every_record_is_left_out(stream: io.StringIO) -> None:
    make = logging.getLogRecordFactory()

    def noted(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        record._noted = 1
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "_logRecordFactory", noted)
        log.info("3 jobs")
    assert set(lines(stream)[0]) == {"time", "level", "logger", "message"}


def test_a_line_inside_says_which_job_and_attempt(stream: io.StringIO) -> None:
    with about(namespace="default", job="a"):
        with about(attempt=2):
            log.info("inner")
        log.info("outer")
    log.info("outside")
    said = [{name: line[name] for name in ("namespace", "job", "attempt") if name in line} for line in lines(stream)]
    assert said == [{"namespace": "default", "job": "a", "attempt": 2}, {"namespace": "default", "job": "a"}, {}]


def test_what_is_not_known_is_left_out(stream: io.StringIO) -> None:
    with about(job="a", attempt=None):
        log.info("early")
    assert "attempt" not in lines(stream)[0]


def test_tasks_side_by_side_do_not_mix_their_jobs(stream: io.StringIO) -> None:
    async def work(job: str) -> None:
        with about(job=job):
            for _ in range(3):
                await asyncio.sleep(0)
                log.info(job)

    async def main() -> None:
        await asyncio.gather(work("a"), work("b"))

    asyncio.run(main())
    assert len(lines(stream)) == 6
    assert all(line["job"] == line["message"] for line in lines(stream))


def test_extra_fields_are_part_of_the_line(stream: io.StringIO) -> None:
    log.warning("failed", extra={"job": "a", "when": complex(1, 2)})
    (line,) = lines(stream)
    assert (line["job"], line["when"]) == ("a", "(1+2j)")


def test_a_traceback_stays_on_its_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("a bug\nin two lines")
    except ValueError:
        log.exception("it broke")
    (line,) = lines(stream)
    assert (line["level"], line["message"], line["error"]) == ("error", "it broke", "ValueError")
    assert "in two lines" in line["traceback"]


def test_warnings_of_python_are_logged(stream: io.StringIO) -> None:
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert lines(stream)[0]["logger"] == "py.warnings"
