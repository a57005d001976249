"""Exit codes of `finetune`: the one place where they are documented."""

from __future__ import annotations

from finetune_api.failures import EXIT_CODES, INTERRUPTED, FailureClass
from finetune_api.progress import Outcome, Result

__all__ = ["EPILOG", "INVALID", "OK", "exit_code_of"]

OK = 0
INVALID = EXIT_CODES[FailureClass.USER_ERROR]

_MEANINGS = {
    OK: "done",
    EXIT_CODES[FailureClass.UNKNOWN]: "unknown failure; the log has the traceback",
    EXIT_CODES[FailureClass.USER_ERROR]: "the job or the command line is not valid",
    EXIT_CODES[FailureClass.DATA_ERROR]: "the data cannot be used",
    EXIT_CODES[FailureClass.NON_FINITE_LOSS]: "the loss became NaN or infinite",
    EXIT_CODES[FailureClass.OUT_OF_MEMORY]: "out of memory",
    EXIT_CODES[FailureClass.STORAGE_ERROR]: "files could not be read or written",
    INTERRUPTED: "stopped by Ctrl-C or a signal",
}

EPILOG = "Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in _MEANINGS.items()) + "."


def exit_code_of(outcome: Outcome) -> int:
    """The exit code of a run that ended so."""
    if outcome.result is Result.SUCCEEDED:
        return OK
    if outcome.result is Result.CANCELLED:
        return INTERRUPTED
    kind = outcome.failure.failure_class if outcome.failure else FailureClass.UNKNOWN
    return EXIT_CODES[kind]
