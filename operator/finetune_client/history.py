"""The figures of a job step by step, and following a job with them while it trains.

Used by the handles of `client`. The log tells of every step; where it cannot be read (its pods are gone, or one has no
right to look into them), the status tells of those at which it was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

from finetune_api.figures import figures_in
from finetune_client.backends.protocol import Backend
from finetune_client.errors import ClientError, NoLog
from finetune_client.views import JobView, LogChoice
from finetune_operator.kinds import Key

__all__ = ["History", "Moment", "Row", "history_of", "moments"]

Row = dict[str, float]
"""The figures of one step by name, `step` among them: a list of rows is what pandas.DataFrame takes."""

_END_SECONDS = 10.0
"""How long the rest of the log may take to come once the job has ended."""


@dataclass(frozen=True, repr=False)
class Moment:
    """A job and the figures of its steps so far. Notebooks draw it."""

    view: JobView
    metrics: list[Row]

    def __repr__(self) -> str:
        return f"{self.view!r} with the figures of {len(self.metrics)} steps"

    def _repr_html_(self) -> str:
        from finetune_client.notebook import html_of

        return html_of(self.view, self.metrics)


class History:
    """Figures by attempt and step. Of a step that two attempts have made, the later one's count."""

    def __init__(self) -> None:
        self._logged: dict[int, dict[int, Row]] = {}
        self._seen: dict[int, Row] = {}

    def read(self, attempt: int, line: str) -> None:
        """Take a line of an attempt's log, which may hold figures. The same line again changes nothing."""
        found = figures_in(line)
        if found is not None:
            step, figures = found
            self._logged.setdefault(attempt, {}).setdefault(step, {}).update(figures)

    def see(self, view: JobView) -> None:
        """Take what the status says."""
        progress = view.status.progress
        if progress is not None and progress.metrics:
            with suppress(ValueError):
                self._seen[progress.step] = {name: float(value) for name, value in progress.metrics.items()}

    @property
    def rows(self) -> list[Row]:
        """A row for each step, in order."""
        steps: dict[int, Row] = {}
        for attempt in sorted(self._logged):
            steps |= self._logged[attempt]
        return [{"step": step, **figures} for step, figures in sorted((steps or self._seen).items())]


async def history_of(backend: Backend, key: Key) -> list[Row]:
    """What the logs of all attempts tell. Raises NoLog when there were attempts and no log is left."""
    history, missing = History(), None
    for attempt in (await backend.get(key)).status.attempts:
        try:
            await _read(backend, key, attempt.number, history, follow=False)
        except NoLog as error:
            missing = error
    if missing is not None and not history.rows:
        raise missing
    return history.rows


async def moments(backend: Backend, key: Key) -> AsyncGenerator[Moment]:
    """The job now and after every change, until nothing more will come of it by itself."""
    history = History()
    readers: dict[int, asyncio.Task[None]] = {}
    try:
        async with aclosing(backend.watch(key)) as views:
            async for view in views:
                history.see(view)
                for attempt in view.status.attempts:
                    # A connection that was cut, or a pod that was not there yet: once more, from the beginning.
                    if attempt.number not in readers or (readers[attempt.number].done() and not attempt.ended_at):
                        reading = _read_if_there(backend, key, attempt.number, history)
                        readers[attempt.number] = asyncio.create_task(reading)
                if view.is_settled and readers:
                    await asyncio.wait(readers.values(), timeout=_END_SECONDS)
                yield Moment(view, history.rows)
                if view.is_settled:
                    return
    finally:
        for reader in readers.values():
            reader.cancel()
        await asyncio.gather(*readers.values(), return_exceptions=True)


async def _read_if_there(backend: Backend, key: Key, attempt: int, history: History) -> None:
    with suppress(ClientError):  # the job is followed all the same
        await _read(backend, key, attempt, history, follow=True)


async def _read(backend: Backend, key: Key, attempt: int, history: History, follow: bool) -> None:
    async with aclosing(backend.logs(key, LogChoice(attempt), follow)) as lines:
        async for line in lines:
            history.read(attempt, line.text)
