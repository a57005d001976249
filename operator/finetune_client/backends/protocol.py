"""What every place that runs jobs can be asked, and no more. `client` speaks to one of them; nobody else does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from finetune_api.job import FineTuneJob
from finetune_api.runtime import FineTuneRuntime
from finetune_client.views import JobEvent, JobView, LogChoice, LogLine
from finetune_operator.kinds import Key

__all__ = ["Backend"]


class Backend(Protocol):
    """Reads and writes jobs. Every method may raise what `errors` lists."""

    @property
    def place(self) -> str:
        """Options that have the finetune command look there; empty where it does by itself."""
        ...

    @property
    def namespace(self) -> str:
        """Of jobs that name none."""
        ...

    async def submit(self, job: FineTuneJob, runtimes: Sequence[FineTuneRuntime], dry_run: bool) -> JobView:
        """Hand a job over; `dry_run` has it judged and no more. Raises InvalidManifest.

        `runtimes` are those that came with it; a cluster has its own.
        """
        ...

    async def get(self, key: Key) -> JobView:
        """The job as it is now. Raises NoSuchJob."""
        ...

    async def list(self, namespace: str | None) -> Sequence[JobView]:
        """All jobs of a namespace, or of all, by name."""
        ...

    def watch(self, key: Key) -> AsyncGenerator[JobView]:
        """The job as it is now, and again whenever it has changed. Raises NoSuchJob, also when it is deleted."""
        ...

    def logs(self, key: Key, which: LogChoice, follow: bool) -> AsyncGenerator[LogLine]:
        """What was written so far, and with `follow` what will be, until the attempt ends. Raises NoLog."""
        ...

    async def suspend(self, key: Key, value: bool) -> JobView:
        """Suspend the job, or let it go on."""
        ...

    async def cancel(self, key: Key) -> None:
        """End the job, and give back what it holds. Raises NoSuchJob."""
        ...

    async def events(self, key: Key) -> Sequence[JobEvent]:
        """What happened to the job, the oldest first; empty where nobody writes it down."""
        ...

    async def close(self) -> None:
        """Let go of connections. Jobs go on."""
        ...
