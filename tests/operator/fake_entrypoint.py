"""An entrypoint that runs nothing: the double of a trainer's process, for tests of the local kubelet and sessions."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune_api.failures import EXIT_CODES, Failure, FailureClass
from finetune_api.progress import Artifact, Outcome, Progress, Result, SavedCheckpoint, Stage
from finetune_operator.local.kubelet import Launch

__all__ = ["NOW", "FakeEntrypoint", "a_checkpoint"]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def a_checkpoint(step: int, at: datetime = NOW) -> SavedCheckpoint:
    """A checkpoint that somebody made."""
    return SavedCheckpoint(uri=f"s3://runs/step-{step}", step=step, saved_at=at, world_size=2, bytes=1000)


class FakeEntrypoint:
    """Ends when it is told to; asked to stop, it does so at the second look after that.

    With `saves` it then leaves a checkpoint.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.progress: Progress | None = None
        self.outcome: Outcome | None = None
        self.log_tail = ""
        self.code: int | None = None
        self.looks_until_stopped: int | None = None
        self.saves = False

    def poll(self) -> int | None:
        if self.looks_until_stopped is not None and self.code is None:
            self.looks_until_stopped -= 1
            if self.looks_until_stopped < 0:
                self.code, self.outcome = 130, Outcome(result=Result.CANCELLED)
                if self.saves and self.progress is not None:
                    saved = self.progress.model_copy(update={"checkpoint": a_checkpoint(self.progress.step)})
                    self.progress = saved
        return self.code

    def stop(self, patiently: bool = False) -> None:
        if self.looks_until_stopped is None:
            self.looks_until_stopped = 1

    def report(self, step: int, at: datetime = NOW, resumed: int | None = None) -> None:
        """The trainers have made so many steps."""
        self.progress = Progress(stage=Stage.TRAINING, step=step, updated_at=at, resumed_from_step=resumed)

    def succeed(self, uri: str = "file:///artifact", kind: str = "model") -> None:
        """The trainers have written a model."""
        artifact = Artifact(uri=uri, kind=kind, digest="b3", bytes=1)
        self.code, self.outcome = 0, Outcome(result=Result.SUCCEEDED, step=5, artifacts=[artifact])

    def fail(self, kind: FailureClass) -> None:
        """The trainers say why they cannot go on."""
        failure = Failure(failure_class=kind, message="it cannot go on")
        self.code, self.outcome = EXIT_CODES[kind], Outcome(result=Result.FAILED, failure=failure)

    def die(self) -> None:
        """SIGKILL: no last word."""
        self.code = 137
