"""A job as it was last seen, whatever runs it: made by the backends, shown by `client` and by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_api.failures import EXIT_CODES, INTERRUPTED, FailureClass
from finetune_api.job import Condition, Phase, Status
from finetune_api.progress import Artifact, Result
from finetune_operator.conditions import find
from finetune_operator.status import read_status

__all__ = ["SUSPENDED_CODE", "JobEvent", "JobView", "LogChoice", "LogLine"]

SUSPENDED_CODE = 75
"""Exit code of a job that is suspended (EX_TEMPFAIL): not done, and to be taken up again."""

_REFUSALS = ("DependencyUnfit", "InvalidSpec", "PlanRefused")
"""Reasons of condition Valid that only a person's edit does away with."""


@dataclass(frozen=True)
class LogChoice:
    """Which of a job's logs is wanted."""

    attempt: int | None = None
    """Its number; None for the newest."""
    everyone: bool = False
    """Of every process that writes one, and not of rank 0's alone."""


@dataclass(frozen=True)
class LogLine:
    """A line that a job's programs wrote."""

    source: str
    """Who wrote it: a pod's name, or a file."""
    text: str


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job."""

    at: datetime | None
    kind: str
    """Normal or Warning."""
    reason: str
    message: str


@dataclass(frozen=True, repr=False)
class JobView:
    """A job and its status at one moment. Notebooks show it with its progress.

    `document` is the whole object, with fields that this version may not know: an older or a newer operator's.
    """

    name: str
    namespace: str
    status: Status
    document: Mapping[str, Any]
    place: str = ""
    """Where it is, as options of the finetune command: --local, say. Empty: where that looks by itself."""

    @classmethod
    def of(cls, document: Mapping[str, Any], place: str = "") -> JobView:
        """The view of a FineTuneJob as JSON has it. What cannot be read of its status is left out."""
        metadata = document["metadata"]
        status = read_status(document.get("status")) or Status()
        return cls(str(metadata["name"]), str(metadata.get("namespace") or "default"), status, document, place)

    @property
    def phase(self) -> Phase:
        """The state in a word."""
        return self.status.phase

    @property
    def created_at(self) -> datetime | None:
        """When it was submitted."""
        text = self.document["metadata"].get("creationTimestamp")
        try:
            at = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
        except ValueError:
            return None
        return at if at.tzinfo else at.replace(tzinfo=UTC)

    @property
    def is_seen(self) -> bool:
        """Whether the operator has looked at the job as it now stands."""
        generation = self.document["metadata"].get("generation")
        return self.status.observed_generation is not None and self.status.observed_generation == generation

    @property
    def wants_suspension(self) -> bool:
        """Whether spec.suspend is true."""
        spec = self.document.get("spec")
        return bool(spec.get("suspend")) if isinstance(spec, Mapping) else False

    @property
    def is_over(self) -> bool:
        """It has succeeded or failed for good."""
        return self.status.finished_at is not None

    @property
    def is_settled(self) -> bool:
        """Nothing more will come of it unless somebody does something."""
        if self.is_over:
            return True
        if not self.is_seen:
            return False
        return self.phase is Phase.SUSPENDED or self.is_refused

    @property
    def is_refused(self) -> bool:
        """The operator cannot run the job as it is written; a runtime that is only missing is waited for."""
        valid = self.condition("Valid")
        return valid is not None and valid.status == "False" and valid.reason in _REFUSALS

    @property
    def artifacts(self) -> list[Artifact]:
        """The trained models that were written."""
        return self.status.artifacts

    @property
    def exit_code(self) -> int:
        """As `finetune run` would end: 0, the class of the failure, 75 when suspended; 0 also while it goes on."""
        if self.phase is Phase.SUSPENDED:
            return SUSPENDED_CODE
        failed = self.condition("Failed")
        if failed is not None and failed.reason == Result.CANCELLED:
            return INTERRUPTED
        if self.status.failure is not None:
            return EXIT_CODES[self.status.failure]
        if self.phase is Phase.FAILED:
            return EXIT_CODES[FailureClass.UNKNOWN]
        return EXIT_CODES[FailureClass.USER_ERROR] if self.is_refused else 0

    def condition(self, name: str) -> Condition | None:
        """The condition of that type, or None."""
        return find(self.status.conditions, name)

    def __repr__(self) -> str:
        from finetune_client.telling import summary

        return f"<{self.name} in {self.namespace}: {summary(self)}>"

    def _repr_html_(self) -> str:
        from finetune_client.notebook import html_of

        return html_of(self)
