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
from collections.abc import Sequence

from finetune_api.answers import Refusal
from finetune_api.failures import EXIT_CODES, INTERRUPTED
from finetune_api.preference_data import (
    DENIED,
    UNREACHABLE,
    DataReport,
    DataRequest,
    ToImport,
    ToJudge,
    parse_request,
)
from finetune_trainers.__main__ import QUIET
from finetune_trainers.answering import answered, tell_step
from finetune_trainers.errors import classified

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Answer the request in `arguments` on stdout -> the exit code."""
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    report = answered(arguments, parse_request, _answer, _refusal)
    return report if isinstance(report, int) else 0


def _answer(asked: DataRequest) -> DataReport:
    if isinstance(asked, ToImport):
        from finetune_trainers.preference_data.importing import import_judgements

        return import_judgements(asked)
    if isinstance(asked, ToJudge):
        from finetune_trainers.preference_data.judging import judge

        return judge(asked, tell_step())
    from finetune_trainers.preference_data.candidates import write_candidates  # brings torch and transformers

    return write_candidates(asked, tell_step())


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
