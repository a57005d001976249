"""How a run can end: one enum that the trainers exit with, the operator retries by, and the CLI reports.

The exit code carries the class across a process boundary where nothing else survives.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import Contract

__all__ = ["EXIT_CODES", "INTERRUPTED", "Failure", "FailureClass", "Problem", "failure_class_of"]


class FailureClass(StrEnum):
    """Why a run ended without success."""

    USER_ERROR = "UserError"
    """The job asks for something that cannot be: a person must change it."""
    DATA_ERROR = "DataError"
    """The data is missing, empty or malformed: a person must change it."""
    NON_FINITE_LOSS = "NonFiniteLoss"
    """The loss or the gradient became NaN or infinite; the last update was not made."""
    KL_DIVERGED = "KLDiverged"
    """The model strayed farther from its reference than method's maxKl allows; nothing was learned from that."""
    OUT_OF_MEMORY = "OutOfMemory"
    """A worker ran out of device or host memory."""
    STORAGE_ERROR = "StorageError"
    """Files could not be read or written."""
    PREEMPTED = "Preempted"
    """The platform took a pod away for something else."""
    NODE_LOST = "NodeLost"
    """A node, or the network to it, went away."""
    START_TIMEOUT = "StartTimeout"
    """The trainers did not start in time: no machines, no image, no volume."""
    HANG = "Hang"
    """The trainers reported nothing for too long."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """The job took longer than it may."""
    DEPENDENCY_FAILED = "DependencyFailed"
    """A job whose artifact is needed has failed, or is not what it should be."""
    UNKNOWN = "Unknown"
    """Anything else; the log has the traceback."""


EXIT_CODES: dict[FailureClass, int] = {
    FailureClass.UNKNOWN: 1,
    FailureClass.USER_ERROR: 2,
    FailureClass.DATA_ERROR: 3,
    FailureClass.NON_FINITE_LOSS: 4,
    FailureClass.OUT_OF_MEMORY: 5,
    FailureClass.STORAGE_ERROR: 6,
    FailureClass.PREEMPTED: 7,
    FailureClass.NODE_LOST: 8,
    FailureClass.START_TIMEOUT: 9,
    FailureClass.HANG: 10,
    FailureClass.DEADLINE_EXCEEDED: 11,
    FailureClass.DEPENDENCY_FAILED: 12,
    FailureClass.KL_DIVERGED: 13,
}
"""Of the trainers, and of `finetune run`; the trainers themselves end with the codes up to 6, and with 13."""
INTERRUPTED = 130
"""Exit code of a run that a person or the platform stopped: 128 + SIGINT, as shells have it."""


def failure_class_of(exit_code: int) -> FailureClass:
    """The class behind a trainer's exit code; codes that are not ours are Unknown."""
    return next((kind for kind, code in EXIT_CODES.items() if code == exit_code), FailureClass.UNKNOWN)


class Problem(Contract):
    """One thing that is wrong: where, what was found, and what would be right."""

    file: str | None = None
    """The manifest or data file, with its line when there is one: rows.jsonl:17."""
    path: str | None = None
    """The field, from the object's root: spec.training.learningRate."""
    value: str | None = None
    """What was found there, shortened."""
    message: str
    """What is wrong and what would be right, in a sentence."""

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.path) if part)
        found = f" (found {self.value})" if self.value is not None else ""
        return f"{where}: {self.message}{found}" if where else f"{self.message}{found}"


class Failure(Contract):
    """The end of a run that did not succeed."""

    failure_class: FailureClass
    message: Annotated[str, Field(max_length=4096)]
    """The first thing to read: one sentence or a few."""
    problems: list[Problem] = Field(default_factory=list)
    """All that was found wrong, when the cause is the job or its data."""
    step: int | None = None
    """Optimizer steps that were done."""
