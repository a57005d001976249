"""What the trainers of a job write, read out of the pods of an attempt.

Used by the backend for Kubernetes; `pod_tail` reads one pod's. The launcher on the head and all workers write to
trainer.log in the run's folder. Where the runtime's storage is a claim, that folder is one for all pods, and the head's
view of it is the whole log; elsewhere each pod has its own, and rank 0's is the log that people mean.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from finetune_api.job import Phase
from finetune_client.backends.patience import Patience
from finetune_client.backends.pod_tail import LOOK_SECONDS, Line, PodTail
from finetune_client.errors import ClientError, NoLog, Refused
from finetune_client.views import JobView, LogChoice, LogLine
from finetune_operator.cluster.connection import Connection
from finetune_operator.kinds import POD, Key
from finetune_operator.names import ATTEMPT_LABEL, HEAD, JOB_LABEL, RAY_CONTAINER, ROLE_LABEL, SCRATCH, WORKER
from finetune_operator.raw import Document, at, items, text

__all__ = ["PodLogs"]

_MOVED_SECONDS = 10.0
"""Between two looks how the attempt stands and where rank 0 is."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
"""What a line of ours begins with."""
_OF_RANK_0 = " worker 0 "
_POST_MORTEM = "status.postMortem"

Send = Callable[..., Awaitable[Document]]
Look = Callable[[], Awaitable[JobView]]


class PodLogs:
    """Reads logs through the API server."""

    def __init__(self, connection: Connection, send: Send) -> None:
        """`send` is the backend's: it explains refusals."""
        self._tail = PodTail(connection)
        self._send = send

    async def read(self, look: Look, key: Key, which: LogChoice, follow: bool) -> AsyncGenerator[LogLine]:
        """The lines of an attempt; `look` is how the job stands. Raises NoLog."""
        told = _Lines(self._tail, key, which.everyone)
        stream = self._followed(look, key, which, told) if follow else self._written(look, key, which, told)
        try:
            async with aclosing(stream) as lines:
                async for line in lines:
                    yield line
        finally:
            await told.close()

    async def _followed(self, look: Look, key: Key, which: LogChoice, told: _Lines) -> AsyncGenerator[LogLine]:
        """What there is and what comes until the attempt ends: connections are cut, pods come and go, and rank 0 may be
        in another one when workers were lost or came back."""
        seen, patience = await self._look(look, key, which), Patience()
        while not seen.has_ended:
            which = LogChoice(seen.number, which.everyone)  # and not of an attempt that begins later
            pods = await self._chosen(key, seen, which.everyone)
            async with aclosing(told.coming(pods, seen, _MOVED_SECONDS if pods else LOOK_SECONDS)) as lines:
                async for line in lines:
                    yield line
            try:
                seen = await self._look(look, key, which)
                patience.renew()
            except ClientError as error:
                patience.spend(error)
                await asyncio.sleep(LOOK_SECONDS)
        async with aclosing(self._written(look, key, which, told)) as lines:
            async for line in lines:
                yield line

    async def _written(self, look: Look, key: Key, which: LogChoice, told: _Lines) -> AsyncGenerator[LogLine]:
        """What there is now, but for what was told."""
        seen = await self._look(look, key, which)
        pods = await self._chosen(key, seen, which.everyone) or seen.workers[:1] or seen.names[:1]
        async with aclosing(told.rest(pods, seen)) as lines:
            async for line in lines:
                yield line
        if told.count == 0:
            for left in _what_is_left(seen.view, seen.number, told.missing):
                yield left

    async def _look(self, look: Look, key: Key, which: LogChoice) -> _Seen:
        view = await look()
        number = _attempt(view, which.attempt)
        return _Seen(view, number, await self._running(key, number) if number is not None else [])

    async def _running(self, key: Key, attempt: int) -> list[Document]:
        selector = f"{JOB_LABEL}={key.name},{ATTEMPT_LABEL}={attempt}"
        path = POD.path(key.namespace)
        page = await self._send("GET", path, key, "list pods", query={"labelSelector": selector})
        running = [pod for pod in items(page, "items") if text(pod, "status", "phase") == "Running"]
        return sorted(running, key=lambda pod: (_role(pod) != HEAD, _name(pod)))

    async def _chosen(self, key: Key, seen: _Seen, everyone: bool) -> list[str]:
        """The pods whose logs are wanted; none while nobody knows where rank 0 is.

        Of an elastic job several may have been rank 0, in one group after the other: the newest line tells. Lines begin
        with their time.
        """
        if seen.is_shared:
            return seen.names[:1]
        if everyone or len(seen.workers) <= 1:
            return seen.names if everyone else seen.workers
        last = await asyncio.gather(*(self._tail.last_of_rank_0(key, pod) for pod in seen.workers))
        return [seen.workers[last.index(max(last))]] if any(last) else []


@dataclass(frozen=True)
class _Seen:
    """An attempt as it was last seen."""

    view: JobView
    number: int | None
    """None while there is none."""
    pods: Sequence[Document]
    """Those that run, the head first."""

    @property
    def has_ended(self) -> bool:
        """Whether it writes no more. A job that is refused as it is now written still runs as it was."""
        if self.number is None:
            return self.view.is_settled
        return self.view.is_over or self.view.phase is Phase.SUSPENDED or _has_ended(self.view, self.number)

    @property
    def is_shared(self) -> bool:
        """Whether the run's folder is one for all pods; one of the pod's own is below SCRATCH."""
        containers = [one for pod in self.pods[:1] for one in items(at(pod, "spec"), "containers")]
        ours = [one for one in containers if text(one, "name") == RAY_CONTAINER]
        variables = {text(one, "name"): text(one, "value") for container in ours for one in items(container, "env")}
        return not variables.get("FINETUNE_WORKDIR", SCRATCH).startswith(SCRATCH)

    @property
    def names(self) -> list[str]:
        """Of the pods."""
        return [_name(pod) for pod in self.pods]

    @property
    def workers(self) -> list[str]:
        """Those of them among which rank 0 is."""
        return [_name(pod) for pod in self.pods if _role(pod) == WORKER]


@dataclass
class _Reading:
    """How far a log has been read."""

    end: int = 0
    """Bytes that were told or passed over."""
    since: str = ""
    """Lines of later times are rank 0's; what a pod wrote before it had the rank is not."""
    is_new: bool = True
    """Whether the line before was one of them; one without a time belongs to it."""


_Item = tuple[_Reading, str, Line]
"""A line that is to be told, and the name of its pod."""


class _Lines:
    """The logs of some pods in one row of lines, each told once, whichever connection brings it."""

    def __init__(self, tail: PodTail, key: Key, everyone: bool) -> None:
        self._tail = tail
        self._key = key
        self._everyone = everyone
        self._queue = asyncio.Queue[_Item | Exception | None](maxsize=1000)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._readings: dict[str, _Reading] = {}
        self._newest = "", ""
        """The time of rank 0's last line, and its pod."""
        self.count = 0
        self.missing: ClientError | None = None
        """Why the last pod without a log has none."""

    async def coming(self, pods: Sequence[str], seen: _Seen, seconds: float) -> AsyncGenerator[LogLine]:
        """What these pods write, for so long; shorter when a connection ends."""
        for line in await self._left(set(self._tasks) - set(pods)):
            yield line
        for pod in pods:
            if pod not in self._tasks or self._tasks[pod].done():
                reading = self._begun(pod, seen)
                self._tasks[pod] = asyncio.create_task(self._pump(pod, reading))
        until = asyncio.get_running_loop().time() + seconds
        while (item := await self._next(until)) is not None:
            if isinstance(item, Exception):
                raise item
            for line in self._told(*item):
                yield line

    async def rest(self, pods: Sequence[str], seen: _Seen) -> AsyncGenerator[LogLine]:
        """What is there and was not told."""
        for line in await self._left(set(self._tasks)):
            yield line
        for pod in pods:
            reading = self._begun(pod, seen)
            try:
                async with aclosing(self._tail.written(self._key, pod, reading.end)) as lines:
                    async for one in lines:
                        for line in self._told(reading, pod, one):
                            yield line
            except NoLog as error:
                self.missing = error
            except Refused as error:  # pods go soon after the end
                if not seen.has_ended:
                    raise
                self.missing = error

    async def close(self) -> None:
        """End what still reads."""
        await self._left(set(self._tasks))

    async def _left(self, pods: Collection[str]) -> list[LogLine]:
        """Leave these pods; what of their lines has come already."""
        leaving = [self._tasks.pop(pod) for pod in pods]
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        told: list[LogLine] = []
        while leaving and not self._queue.empty():
            item = self._queue.get_nowait()
            if isinstance(item, tuple):
                told += self._told(*item)
        return told

    async def _pump(self, pod: str, reading: _Reading) -> None:
        try:
            async with aclosing(self._tail.growing(self._key, pod, reading.end)) as lines:
                async for line in lines:
                    await self._queue.put(None if line is None else (reading, pod, line))
        except Exception as error:  # whoever reads the queue has it
            await self._queue.put(error)

    async def _next(self, until: float) -> _Item | Exception | None:
        """What comes next; None when it is time to look again."""
        if asyncio.get_running_loop().time() >= until:
            return None
        try:
            async with asyncio.timeout_at(until):
                return await self._queue.get()
        except TimeoutError:
            return None

    def _begun(self, pod: str, seen: _Seen) -> _Reading:
        """Where to go on with a pod's log. One that all pods share is one log."""
        reading = self._readings.setdefault("" if seen.is_shared else pod, _Reading())
        since, before = self._newest
        if not (self._everyone or seen.is_shared or before in ("", pod)):
            reading.since, reading.is_new = since, False
        return reading

    def _told(self, reading: _Reading, pod: str, line: Line) -> Iterator[LogLine]:
        """The line, if it is rank 0's."""
        reading.end = line.end
        if at := _TIME.match(line.text):
            reading.is_new = at[0] > reading.since
            if _OF_RANK_0 in line.text and reading.is_new:
                self._newest = at[0], pod
        if reading.is_new:
            self.count += 1
            yield LogLine(pod, line.text)


def _attempt(view: JobView, asked: int | None) -> int | None:
    """The number of the attempt; None while there is none. Raises NoLog for one that never was."""
    known = [attempt.number for attempt in view.status.attempts]
    if asked is None:
        return known[-1] if known else None
    if asked not in known:
        numbers = ", ".join(map(str, known)) or "none yet"
        raise NoLog(f"job {view.name} has no attempt {asked}; it has {numbers}")
    return asked


def _has_ended(view: JobView, number: int) -> bool:
    return any(attempt.number == number and attempt.ended_at is not None for attempt in view.status.attempts)


def _what_is_left(view: JobView, number: int | None, missing: ClientError | None) -> list[LogLine]:
    """What the status kept of an attempt that has no log to be read. Raises NoLog where that is nothing; `missing` is
    why its pods have none, if there are any.
    """
    if number is None:
        raise NoLog(f"job {view.name} has not started; finetune describe {view.name} -n {view.namespace} says why")
    found = view.status.post_mortem
    if found is not None and found.attempt == number and found.message:
        return [LogLine(_POST_MORTEM, line) for line in found.message.splitlines()]
    if missing is not None:
        raise NoLog(f"{missing}; {'the attempt has ended' if _has_ended(view, number) else '-f waits for it'}")
    if _has_ended(view, number):
        raise NoLog(
            f"the pods of attempt {number} are gone, and their log with them, unless the runtime's storage is a claim: "
            f"trainer.log is in {view.namespace}/{view.name}/attempt-{number} there"
        )
    raise NoLog(f"attempt {number} has no running pod yet; -f waits for one")


def _role(pod: Document) -> str:
    return text(at(pod, "metadata", "labels"), ROLE_LABEL)


def _name(pod: Document) -> str:
    return text(pod, "metadata", "name")
