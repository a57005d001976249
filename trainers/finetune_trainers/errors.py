"""What can go wrong in a run, and the class that it ends the run with.

    TrainerError                 carries a FailureClass and the problems found
      ├── UserError              the job asks for something that cannot be
      ├── DataError              rows or files of data that cannot be used
      ├── NonFiniteLossError     the loss or gradient is NaN or infinite; raised before the update
      └── StorageError           files that cannot be read or written

Raised where the fault is seen, turned into an `Outcome` and an exit code once, in `__main__`.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.failures import Failure, FailureClass, Problem

__all__ = ["DataError", "NonFiniteLossError", "StorageError", "TrainerError", "UserError"]


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


class StorageError(TrainerError):
    failure_class = FailureClass.STORAGE_ERROR
