"""Answers one request about preference data. `finetune data` starts it.

    python -m finetune_trainers.preference_data '{"verb": "import", "source": "file:///a.jsonl", "to": "b.jsonl"}'

Each line on stdout is a `Told`: how far it has come, then the report or why there is none. The exit code is 0, that of
a failure's class (finetune_api.failures.EXIT_CODES), 22 when a judge does not answer, 23 when it does not let us ask,
130 after a stop request. torch is imported for candidates alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from pydantic import ValidationError

from finetune_api.failures import EXIT_CODES, INTERRUPTED
from finetune_api.preference_data import (
    DENIED,
    UNREACHABLE,
    DataReport,
    DataRequest,
    Refusal,
    Step,
    ToImport,
    ToJudge,
    Told,
    parse_request,
)
from finetune_trainers.__main__ import QUIET
from finetune_trainers.errors import UserError, classified

__all__ = ["main"]

_TELL_SECONDS = 0.2


def main(arguments: Sequence[str]) -> int:
    """Answer the request in `arguments` on stdout -> the exit code."""
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    try:
        report = _answer(_request(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        refusal = _refusal(error)
        _tell(Told(refusal=refusal))
        return refusal.exit_code
    _tell(Told(report=report.model_dump(mode="json", by_alias=True)))
    return 0


def _request(given: Sequence[str]) -> DataRequest:
    try:
        (text,) = given
        return parse_request(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}") from None
    except ValueError:
        raise UserError("one argument is expected: a request as JSON; see finetune data --help") from None


def _answer(asked: DataRequest) -> DataReport:
    if isinstance(asked, ToImport):
        from finetune_trainers.preference_data.importing import import_judgements

        return import_judgements(asked)
    if isinstance(asked, ToJudge):
        from finetune_trainers.preference_data.judging import judge

        return judge(asked, _Progress())
    from finetune_trainers.preference_data.candidates import write_candidates  # brings torch and transformers

    return write_candidates(asked, _Progress())


class _Progress:
    """Tells how far it has come, a few times a second, and the end."""

    def __init__(self) -> None:
        self._told_at = 0.0

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if now - self._told_at >= _TELL_SECONDS or step.done == step.total:
            self._told_at = now
            _tell(Told(progress=step))


def _tell(told: Told) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more
        print(told.model_dump_json(by_alias=True), flush=True)


def _refusal(error: Exception) -> Refusal:
    from finetune_trainers.preference_data.asking import DeniedError, UnreachableError

    failure = classified(error)
    if isinstance(error, UnreachableError):
        code = UNREACHABLE
    elif isinstance(error, DeniedError):
        code = DENIED
    else:
        code = EXIT_CODES[failure.failure_class]
    return Refusal(message=failure.message, problems=failure.problems, exit_code=code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    code = main(sys.argv[1:])
    sys.stdout.flush()
    if code == INTERRUPTED:
        os._exit(code)  # the interpreter would wait for requests that a judge has not answered yet
    sys.exit(code)
