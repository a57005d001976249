"""Exit codes of `finetune`: the one place where they are documented.

The numbers are those of `finetune_api.failures` and `finetune_api.checkpoints`, written out: importing them would slow
`finetune --help` down, and a test compares the two.
"""

from __future__ import annotations

__all__ = [
    "ABSENT",
    "CKPT_EPILOG",
    "CKPT_MEANINGS",
    "DAMAGED",
    "DATA_EPILOG",
    "DATA_MEANINGS",
    "DENIED",
    "EPILOG",
    "INVALID",
    "IN_USE",
    "JOBS_EPILOG",
    "JOBS_MEANINGS",
    "MEANINGS",
    "NOT_INSTALLED",
    "OK",
    "SERVE_EPILOG",
    "SERVE_MEANINGS",
    "SUSPENDED",
    "UNREACHABLE",
]

OK = 0
INVALID = 2
SUSPENDED = 75
"""EX_TEMPFAIL: not done, and to be taken up again."""
DAMAGED = 20
IN_USE = 21
UNREACHABLE = 22
DENIED = 23
NOT_INSTALLED = 24
ABSENT = 25

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
    13: "the model strayed too far from its reference",
    SUSPENDED: "suspended, go on with finetune run --resume",
    130: "stopped by Ctrl-C or a signal",
}

EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in MEANINGS.items()) + "."

CKPT_MEANINGS = {
    OK: "done, and what was verified is whole",
    1: "unknown failure",
    INVALID: "the command line is not valid, or there is no such checkpoint",
    6: "files cannot be read or written",
    DAMAGED: "a checkpoint is damaged",
    IN_USE: "refused, a run seems to be at work there",
    130: "stopped by Ctrl-C or a signal",
}
"""Of `finetune ckpt`."""

CKPT_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in CKPT_MEANINGS.items()) + "."

DATA_MEANINGS = {
    OK: "done",
    1: "unknown failure",
    INVALID: "the command line is not valid, or the model cannot be used",
    3: "the data cannot be used",
    5: "out of memory",
    6: "files cannot be read or written",
    UNREACHABLE: "the judge does not answer; the same command goes on",
    DENIED: "the judge does not let us ask",
    130: "stopped by Ctrl-C or a signal; the same command goes on",
}
"""Of `finetune data`."""

DATA_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in DATA_MEANINGS.items()) + "."

JOBS_MEANINGS = {
    OK: "done",
    1: "unknown failure, or a server refused",
    INVALID: "the job or the command line is not valid",
    UNREACHABLE: "nothing answers there",
    DENIED: "you may not do that there",
    NOT_INSTALLED: "finetune-operator is not installed there",
    ABSENT: "there is no such job, or no log of it",
    130: "stopped by Ctrl-C or a signal; the job goes on",
}
"""Of the commands for jobs that run elsewhere."""

JOBS_EPILOG = (
    "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in JOBS_MEANINGS.items()) + ". "
    "submit --wait and watch end as finetune run does: by the class of the failure, or 75 when suspended."
)

SERVE_MEANINGS = {
    OK: "it has served, and was told to end",
    1: "the server ended by itself",
    INVALID: "the command line is not valid, or the model cannot be served",
    5: "out of memory",
    6: "files cannot be read or written",
    UNREACHABLE: "nothing answers there",
    DENIED: "you may not do that there",
    NOT_INSTALLED: "finetune-operator is not installed there",
    ABSENT: "there is no such job, or no model of it here",
    130: "stopped by Ctrl-C or a signal before it served",
}
"""Of `finetune serve`."""

SERVE_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in SERVE_MEANINGS.items()) + "."
