"""The verbs of a backend over drivers that can be asked: what `local` and `ray_client` have in common.

Implements `Backend` but for how a driver is reached: that is `Drivers`.
"""

from __future__ import annotations

import asyncio
import json
from codecs import getincrementaldecoder
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune_api.job import FineTuneJob, Phase
from finetune_api.runtime import FineTuneRuntime
from finetune_client.backends.asking import LOOK_SECONDS, changes, planned
from finetune_client.backends.told import ended_without_a_word, not_settled, not_told_yet, taken
from finetune_client.commands import about
from finetune_client.driven import Told
from finetune_client.errors import NoLog, Refused
from finetune_client.output import Reader
from finetune_client.views import JobEvent, JobView, LogChoice, LogLine
from finetune_operator.kinds import Key

__all__ = ["Drivers", "DriversBackend"]

_SOON_SECONDS = 0.2
_END_SECONDS = 60.0
_LOG = "trainer.log"


class Drivers(Protocol):
    """The drivers of one place. Those that take a key raise NoSuchJob for a job that is not there."""

    @property
    def place(self) -> str:
        """See Backend."""
        ...

    async def keys(self) -> Sequence[Key]:
        """Every job that was submitted and not cancelled."""
        ...

    async def start(self, key: Key, packed: str) -> None:
        """Begin a job, from a packed submission. Raises FileExistsError where one of the name is there: of several who
        come at once, one begins it."""
        ...

    async def told(self, key: Key) -> Told:
        """How it stands."""
        ...

    async def output(self, key: Key, start: int) -> bytes:
        """What its driver has printed from byte `start` on."""
        ...

    async def suspend(self, key: Key) -> None:
        """Ask its driver to suspend it."""
        ...

    async def resume(self, key: Key) -> None:
        """Start its driver once more, if that works no longer."""
        ...

    async def remove(self, key: Key) -> None:
        """End its driver and what that has started, and forget the job."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class DriversBackend:
    """Jobs that are run by drivers."""

    def __init__(self, drivers: Drivers, namespace: str | None, is_here: bool = False) -> None:
        """Only names are told apart by `namespace`. `is_here`: the drivers share this machine's disk."""
        self._is_here = is_here
        self._drivers = drivers
        self._namespace = namespace or "default"

    @property
    def place(self) -> str:
        """See Backend."""
        return self._drivers.place

    @property
    def namespace(self) -> str:
        """Of jobs that name none."""
        return self._namespace

    async def submit(self, job: FineTuneJob, runtimes: Sequence[FineTuneRuntime], dry_run: bool) -> JobView:
        """See Backend."""
        submitted = planned(job, runtimes, self._namespace, self._is_here)
        key, packed = submitted.key, submitted.packed()
        if key in await self._drivers.keys():
            raise taken(key, self.place)
        if not dry_run:
            try:
                await self._drivers.start(key, packed)
            except FileExistsError:  # somebody else was quicker
                raise taken(key, self.place) from None
        return JobView.of(submitted.job, self.place)

    async def get(self, key: Key) -> JobView:
        """See Backend."""
        return _view(key, await self._drivers.told(key), self.place)

    async def list(self, namespace: str | None) -> Sequence[JobView]:
        """See Backend."""
        keys = sorted(key for key in await self._drivers.keys() if namespace in (None, key.namespace))
        return [await self.get(key) for key in keys]

    def watch(self, key: Key) -> AsyncGenerator[JobView]:
        """See Backend. The driver's place is asked every second."""
        return changes(lambda: self.get(key))

    async def logs(self, key: Key, which: LogChoice, follow: bool) -> AsyncGenerator[LogLine]:
        """See Backend. All processes of an attempt write one log, so there is no other to be had."""
        reader, decoder = Reader(), getincrementaldecoder("utf-8")("replace")
        place, attempt = 0, which.attempt
        while True:
            works = (await self._drivers.told(key)).works  # before what it said last is read
            printed = await self._drivers.output(key, place)
            place += len(printed)
            lines = reader.read(decoder.decode(printed))
            attempt = attempt or (reader.attempts[-1] if reader.attempts else None)
            if attempt in reader.attempts:
                for number, line in lines:
                    if number == attempt:
                        yield LogLine(_LOG, line)
            elif reader.attempts or not follow or not works:
                numbers = ", ".join(map(str, reader.attempts)) or "none yet"
                raise NoLog(f"job {key.name} has no log of attempt {attempt or 1}; attempts with a log: {numbers}")
            if not follow or not works or (reader.attempts and reader.attempts[-1] != attempt):
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def suspend(self, key: Key, value: bool) -> JobView:
        """See Backend."""
        told = await self._drivers.told(key)
        view = _view(key, told, self.place)
        if view.is_over:
            raise Refused(f"job {key.name} has ended ({view.phase}); submit another one")
        if value:
            await self._drivers.suspend(key)
            return await self.get(key)
        if told.works and view.phase is not Phase.SUSPENDED and view.wants_suspension:
            raise Refused(f"job {key.name} still saves and stops; resume it when it is Suspended")
        if view.phase is Phase.SUSPENDED:
            await self._end(key)
            await self._drivers.resume(key)
        return await self.get(key)

    async def _end(self, key: Key) -> None:
        """Waits for the end of a driver that has said its last word."""
        for _ in range(round(_END_SECONDS / _SOON_SECONDS)):
            if not (await self._drivers.told(key)).works:
                return
            await asyncio.sleep(_SOON_SECONDS)
        raise Refused(f"the driver of job {key.name} does not end; {about('cancel', key, self.place)} ends it")

    async def cancel(self, key: Key) -> None:
        """See Backend. Its folder stays."""
        await self._drivers.remove(key)

    async def events(self, key: Key) -> Sequence[JobEvent]:
        """See Backend. Nobody writes them down here."""
        return []

    async def close(self) -> None:
        """See Backend."""
        await self._drivers.close()


def _view(key: Key, told: Told, place: str) -> JobView:
    told_yet = told.document is not None
    document: dict[str, Any] = json.loads(told.document or "") if told_yet else not_told_yet(key, told.submitted_at)
    document = {**document, "metadata": {**document["metadata"], "creationTimestamp": told.submitted_at}}
    view = JobView.of(document, place)
    if told.works and view.phase is Phase.SUSPENDED:
        return JobView.of(not_settled(document), place)
    if told.works or view.is_over or view.phase is Phase.SUSPENDED:
        return view
    at = datetime.now(UTC).isoformat()
    return JobView.of(ended_without_a_word(document, "it left no word", False, at, told.last_output), place)
