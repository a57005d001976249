"""Jobs on a Ray cluster that runs already, by its Jobs API: no Kubernetes, no Ray on this machine, no shared disk.

Implements `Backend`. A job becomes a Ray job whose command is `finetune_client.driver`, the operator for one job; the
cluster's image must have finetune-operator with its trainers. What the driver prints is all that comes back: the log,
and the job between its lines. A job that was suspended and goes on is another Ray job over the same folder, so a job
of ours is a row of Ray's, told apart by their metadata.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_api.job import FineTuneJob, Phase
from finetune_api.runtime import FineTuneRuntime
from finetune_client.backends.asking import LOOK_SECONDS, changes, planned
from finetune_client.backends.patience import Patience
from finetune_client.backends.ray_http import RayJobInfo, RayJobsApi
from finetune_client.backends.told import absent, ended_without_a_word, new_folder, not_settled, not_told_yet, taken
from finetune_client.errors import ClientError, NoLog, Refused
from finetune_client.output import Reader, attempts_in, newest_document
from finetune_client.submission import SUBMISSION_VARIABLE
from finetune_client.views import JobEvent, JobView, LogChoice, LogLine
from finetune_operator.kinds import Key

__all__ = ["RayJobsBackend"]

_DRIVER = "python -m finetune_client.driver"
_JOB, _NAMESPACE, _FOLDER, _TURN = (f"finetune-operator.io/{name}" for name in ("job", "namespace", "folder", "turn"))
_STOP_SECONDS = 240.0
"""A machine that trains with all it has needs a minute to start the short job that brings a wish."""
_LAST_LINES = 1000
"""Among so many the driver has told the job at least once."""
_LOG = "trainer.log"


@dataclass(frozen=True)
class _Turn:
    """One Ray job of a job of ours: from submitting or resuming it to its end or suspension."""

    info: RayJobInfo

    @property
    def key(self) -> Key:
        return Key(self.info.metadata[_NAMESPACE], self.info.metadata[_JOB])

    @property
    def number(self) -> int:
        return int(self.info.metadata[_TURN])

    @property
    def folder(self) -> str:
        return self.info.metadata[_FOLDER]


class RayJobsBackend:
    """One Ray cluster."""

    def __init__(self, url: str, namespace: str | None = None, workdir: str | None = None) -> None:
        """`workdir` is a folder of the cluster, on a disk that all its nodes share if there are several."""
        self._api = RayJobsApi(url)
        self._namespace = namespace or "default"
        self._workdir = (workdir or "~/.finetune/jobs").rstrip("/")

    @property
    def place(self) -> str:
        """See Backend."""
        return f"--ray {shlex.quote(self._api.url)}"

    @property
    def namespace(self) -> str:
        """Of jobs that name none; only names are told apart by it."""
        return self._namespace

    async def submit(self, job: FineTuneJob, runtimes: Sequence[FineTuneRuntime], dry_run: bool) -> JobView:
        """See Backend."""
        submitted = planned(job, runtimes, self._namespace)
        key, packed = submitted.key, submitted.packed()
        if await self._turns(key):
            raise taken(key, self.place)
        if not dry_run:
            await self._start(key, 1, new_folder(self._workdir, key), {SUBMISSION_VARIABLE: packed})
        return JobView.of(submitted.job, self.place)

    async def get(self, key: Key) -> JobView:
        """See Backend."""
        return await self._view(await self._known(key))

    async def list(self, namespace: str | None) -> Sequence[JobView]:
        """See Backend."""
        jobs: dict[Key, list[_Turn]] = {}
        for turn in await self._all():
            if namespace in (None, turn.key.namespace):
                jobs.setdefault(turn.key, []).append(turn)
        return [await self._view(jobs[key]) for key in sorted(jobs)]

    def watch(self, key: Key) -> AsyncGenerator[JobView]:
        """See Backend. The dashboard is asked every second."""
        return changes(lambda: self.get(key))

    async def logs(self, key: Key, which: LogChoice, follow: bool) -> AsyncGenerator[LogLine]:
        """See Backend. All processes of an attempt write one log, so there is no other to be had."""
        turn, attempt = await self._attempt(key, which.attempt, follow)
        reader = Reader()
        pieces = self._printed(turn.info.id, follow)
        async with aclosing(pieces):
            async for piece in pieces:
                for number, text in reader.read(piece):
                    if number == attempt:
                        yield LogLine(_LOG, text)
                if attempt in reader.attempts and reader.attempts[-1] != attempt:
                    return

    async def _printed(self, id: str, follow: bool) -> AsyncGenerator[str]:
        """What a Ray job has printed, piece by piece, and with `follow` what it will until it ends, over any number of
        connections."""
        num_read, is_over, patience = 0, not follow, Patience()
        while not is_over:
            try:
                place = 0  # each connection begins anew
                async with aclosing(self._api.tail(id)) as pieces:
                    async for piece in pieces:
                        patience.renew()
                        new, place = piece[max(0, num_read - place) :], place + len(piece)
                        num_read = max(num_read, place)
                        if new:
                            yield new
                is_over = (await asyncio.to_thread(self._api.job, id)).is_over
            except ClientError as error:
                patience.spend(error)
            await asyncio.sleep(0 if is_over else LOOK_SECONDS)
        # A connection that was cut at the end looks like one that ended.
        yield (await asyncio.to_thread(self._api.output, id))[num_read:]

    async def suspend(self, key: Key, value: bool) -> JobView:
        """See Backend. The wish is brought to the cluster by another, short Ray job."""
        turns = await self._known(key)
        view, newest = await self._view(turns), turns[-1]
        if view.is_over:
            raise Refused(f"job {key.name} has ended ({view.phase}); submit another one")
        if value and not newest.info.is_over:
            await self._run_helper(newest)
        elif not value and view.phase is Phase.SUSPENDED:
            await self._end(newest.info.id)  # it has said its last word, and may still be leaving
            await self._start(key, newest.number + 1, newest.folder, {})
        elif not value and view.wants_suspension:
            raise Refused(f"job {key.name} still saves and stops; resume it when it is Suspended")
        return await self.get(key)

    async def cancel(self, key: Key) -> None:
        """See Backend. Its folder on the cluster stays."""
        turns = await self._known(key)
        for turn in turns:
            if not turn.info.is_over:
                await asyncio.to_thread(self._api.stop, turn.info.id)
            await self._end(turn.info.id)
            await asyncio.to_thread(self._api.delete, turn.info.id)

    async def events(self, key: Key) -> Sequence[JobEvent]:
        """See Backend. Nobody writes them down here."""
        return []

    async def close(self) -> None:
        """See Backend."""

    async def _start(self, key: Key, number: int, folder: str, variables: dict[str, str]) -> None:
        metadata = {_JOB: key.name, _NAMESPACE: key.namespace, _FOLDER: folder, _TURN: str(number)}
        id = f"finetune-{key.namespace}-{key.name}-{number}"
        try:
            await asyncio.to_thread(self._api.submit, id, f"{_DRIVER} {_typed(folder)}", variables, metadata)
        except FileExistsError:  # somebody else was quicker
            raise taken(key, self.place) from None

    async def _run_helper(self, turn: _Turn) -> None:
        id = f"{turn.info.id}-suspend-{datetime.now(UTC):%H%M%S%f}"
        await asyncio.to_thread(self._api.submit, id, f"{_DRIVER} {_typed(turn.folder)} --suspend", {}, {})
        info = await self._end(id)
        if info.status != "SUCCEEDED":
            raise Refused(f"the wish to suspend did not reach job {turn.key.name}: {info.message}")
        await asyncio.to_thread(self._api.delete, id)

    async def _end(self, id: str) -> RayJobInfo:
        """Waits for a Ray job's end. Raises Refused."""
        for _ in range(round(_STOP_SECONDS / LOOK_SECONDS * 4)):
            info = await asyncio.to_thread(self._api.job, id)
            if info.is_over:
                return info
            await asyncio.sleep(LOOK_SECONDS / 4)
        raise Refused(f"Ray job {id} has not ended within {_STOP_SECONDS:.0f} s; look at it in Ray's dashboard")

    async def _all(self) -> Sequence[_Turn]:
        found = [_Turn(info) for info in await asyncio.to_thread(self._api.jobs) if _TURN in info.metadata]
        return sorted(found, key=lambda turn: (turn.key, turn.number))

    async def _turns(self, key: Key) -> Sequence[_Turn]:
        return [turn for turn in await self._all() if turn.key == key]

    async def _known(self, key: Key) -> Sequence[_Turn]:
        turns = await self._turns(key)
        if not turns:
            raise absent(key, self._api.url, self.place)
        return turns

    async def _view(self, turns: Sequence[_Turn]) -> JobView:
        newest = turns[-1]
        document = await self._told(newest)
        if document is None and len(turns) > 1:
            document = await self._told(turns[-2])  # resumed a moment ago
        document = document or not_told_yet(
            newest.key, _written(newest.info.started_ms) or datetime.now(UTC).isoformat()
        )
        document["metadata"]["creationTimestamp"] = _written(turns[0].info.started_ms)
        view = JobView.of(document, self.place)
        if not newest.info.is_over and view.phase is Phase.SUSPENDED:
            return JobView.of(not_settled(document), self.place)
        if not newest.info.is_over or view.is_over or view.phase is Phase.SUSPENDED:
            return view
        output = await asyncio.to_thread(self._api.last_output, newest.info.id, 20)
        at = _written(newest.info.ended_ms) or datetime.now(UTC).isoformat()
        stopped = newest.info.status == "STOPPED"
        return JobView.of(ended_without_a_word(document, newest.info.message, stopped, at, output), self.place)

    async def _told(self, turn: _Turn) -> dict[str, Any] | None:
        return newest_document(await asyncio.to_thread(self._api.last_output, turn.info.id, _LAST_LINES))

    async def _attempt(self, key: Key, asked: int | None, follow: bool) -> tuple[_Turn, int]:
        """The Ray job in which the attempt is, and its number. When following, the newest may be waited for."""
        while True:
            turns = await self._known(key)
            written = [
                (turn, number)
                for turn in turns
                for number in attempts_in(await asyncio.to_thread(self._api.output, turn.info.id))
            ]
            chosen = [one for one in written if asked in (None, one[1])]
            if chosen:
                return chosen[-1]
            if asked is not None or not follow or turns[-1].info.is_over:
                numbers = ", ".join(str(number) for _, number in written) or "none yet"
                raise NoLog(f"job {key.name} has no log of attempt {asked or 1}; attempts with a log: {numbers}")
            await asyncio.sleep(LOOK_SECONDS)


def _written(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat() if milliseconds else None


def _typed(folder: str) -> str:
    """For a shell; a ~ is the driver's to expand."""
    return shlex.quote(folder)
