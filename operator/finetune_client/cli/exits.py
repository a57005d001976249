"""Exit codes of `finetune`: the one place where they are documented.

The numbers are those of `finetune_api.failures`, written out: importing it would slow `finetune --help` down, and a
test compares the two.
"""

from __future__ import annotations

__all__ = ["EPILOG", "INVALID", "MEANINGS", "OK", "SUSPENDED"]

OK = 0
INVALID = 2
SUSPENDED = 75
"""EX_TEMPFAIL: not done, and to be taken up again."""

MEANINGS = {
    OK: "done",
    1: "unknown failure, see the log",
    INVALID: "the job or the command line is not valid",
    3: "the data cannot be used",
    4: "the loss became NaN or infinite",
    5: "out of memory",
    6: "files cannot be read or written",
    7: "preempted",
    8: "a node was lost",
    9: "the trainers did not start in time",
    10: "the trainers hung",
    11: "the job took longer than it may",
    12: "a job that this one needs has failed",
    SUSPENDED: "suspended, go on with finetune run --resume",
    130: "stopped by Ctrl-C or a signal",
}

EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + "."
