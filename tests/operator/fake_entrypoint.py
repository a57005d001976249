"""An entrypoint that runs nothing: the double of a trainer's process, for tests of the local kubelet and sessions."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune_api.failures import EXIT_CODES, Failure, FailureClass
from finetune_api.progress import Artifact, Outcome, Progress, Result, Stage
from finetune_operator.local.kubelet import Launch

__all__ = ["NOW", "FakeEntrypoint"]

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class FakeEntrypoint:
    """Ends when it is told to; asked to stop, it does so at the second look after that."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.progress: Progress | None = None
        self.outcome: Outcome | None = None
        self.log_tail = ""
        self.code: int | None = None
        self.looks_until_stopped: int | None = None

    def poll(self) -> int | None:
        if self.looks_until_stopped is not None and self.code is None:
            self.looks_until_stopped -= 1
            if self.looks_until_stopped < 0:
                self.code = 130
        return self.code

    def stop(self) -> None:
        if self.looks_until_stopped is None:
            self.looks_until_stopped = 1

    def report(self, step: int, at: datetime = NOW) -> None:
        """The trainers have made so many steps."""
        self.progress = Progress(stage=Stage.TRAINING, step=step, updated_at=at)

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
