"""What can go wrong in a run, and the class that it ends the run with.

    TrainerError                 carries a FailureClass and the problems found
      ├── UserError              the job asks for something that cannot be
      ├── DataError              rows or files of data that cannot be used
      ├── NonFiniteLossError     the loss or gradient is NaN or infinite; raised before the update
      ├── KLDivergedError        the model strayed too far from its reference
      ├── OutOfMemoryError       a worker ran out of the device's or the machine's memory
      ├── PeerLostError          the connection to another worker broke off: it is gone, for a reason of its own
      └── StorageError           files that cannot be read or written

Raised where the fault is seen, turned into an `Outcome` and an exit code once, in `__main__`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from finetune_api.failures import Failure, FailureClass, Problem

__all__ = [
    "DataError",
    "KLDivergedError",
    "NonFiniteLossError",
    "OutOfMemoryError",
    "PeerLostError",
    "StorageError",
    "TrainerError",
    "UserError",
    "classified",
]


class TrainerError(Exception):
    """A failure with a class and, when the cause is the job or its data, the problems that a person must mend."""

    failure_class = FailureClass.UNKNOWN

    def __init__(self, message: str, problems: Sequence[Problem] = (), step: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.problems = list(problems)
        self.step = step

    def __reduce__(self) -> tuple[type[TrainerError], tuple[str, list[Problem], int | None]]:
        """Errors cross process boundaries whole."""
        return type(self), (self.message, self.problems, self.step)

    def to_failure(self) -> Failure:
        return Failure(
            failure_class=self.failure_class, message=self.message[:4096], problems=self.problems, step=self.step
        )


class UserError(TrainerError):
    failure_class = FailureClass.USER_ERROR


class DataError(TrainerError):
    failure_class = FailureClass.DATA_ERROR


class NonFiniteLossError(TrainerError):
    failure_class = FailureClass.NON_FINITE_LOSS


class KLDivergedError(TrainerError):
    failure_class = FailureClass.KL_DIVERGED


class OutOfMemoryError(TrainerError):
    failure_class = FailureClass.OUT_OF_MEMORY


class PeerLostError(TrainerError):
    """Told by a worker that survives, often before anybody has noticed the one that is gone."""


class StorageError(TrainerError):
    failure_class = FailureClass.STORAGE_ERROR


_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}


_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "ncclRemoteError")
"""What gloo, NCCL, and PyTorch of NCCL, say of a worker that is gone."""


def classified(error: BaseException) -> TrainerError:
    """`error` as a TrainerError: itself, or one of the class that its kind tells, Unknown at the last."""
    if isinstance(error, TrainerError):
        return error
    if _is_out_of_memory(error):
        return OutOfMemoryError(
            f"Memory ran out: {first_line(error)}. Lower spec.training.microBatchSize or the method's maxSeqLength,"
            " turn on spec.training.activationCheckpointing, or raise spec.deepspeed.zeroStage."
        )
    if isinstance(error, PermissionError):
        where = f"{error.filename!r}" if error.filename else "A file"
        return UserError(
            f"{where} may not be used by the user that this run has (number {os.geteuid()}):"
            f" {error.strerror or first_line(error)}. Give that user the right to it: chmod or chown what it lies in."
        )
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return StorageError(f"A file could not be written or read: {error}")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_LOST):
        return PeerLostError(f"The connection to another worker broke off: {first_line(error)}")
    return TrainerError(f"{type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of the error's text that says anything."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "no message")


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # errors of a library that is not loaded cannot have been raised
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator
