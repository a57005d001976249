"""What the trainers of a job write, read out of the pods of an attempt.

Used by the backend for Kubernetes. The launcher on the head and all workers write to trainer.log in the run's folder.
Where the runtime's storage is a claim, that folder is one for all pods, and the head's view of it is the whole log;
elsewhere each pod has its own, and rank 0's is the log that people mean. A container's own output is Ray's, not ours,
so the file is read by a command in the container: that needs the right to `pods/exec`, as `kubectl exec` does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any

from finetune_client.backends.refusals import error_for
from finetune_client.errors import ClientError, NoLog
from finetune_client.views import JobView, LogChoice, LogLine
from finetune_operator.cluster.connection import Connection
from finetune_operator.errors import ClusterError
from finetune_operator.kinds import POD, Key
from finetune_operator.names import ATTEMPT_LABEL, HEAD, JOB_LABEL, RAY_CONTAINER, ROLE_LABEL, SCRATCH, WORKER
from finetune_operator.raw import Document, at, items, text

__all__ = ["PodLogs"]

_LOOK_SECONDS = 2.0
_MOVED_SECONDS = 10.0
"""Between two looks where rank 0 is."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
"""What a line of ours begins with."""
_STDOUT = 1
_LOG = '"$FINETUNE_WORKDIR/trainer.log"'
_READ = f"cat {_LOG}"
_FOLLOW = f"exec tail -n +1 -F {_LOG} 2>/dev/null"
_LAST_OF_RANK_0 = f"grep ' worker 0 ' {_LOG} | tail -n 1"
_POST_MORTEM = "status.postMortem"

Send = Callable[..., Awaitable[Document]]
Look = Callable[[], Awaitable[JobView]]


class PodLogs:
    """Reads logs through the API server."""

    def __init__(self, connection: Connection, send: Send) -> None:
        """`send` is the backend's: it explains refusals."""
        self._connection = connection
        self._send = send

    async def read(self, look: Look, key: Key, which: LogChoice, follow: bool) -> AsyncGenerator[LogLine]:
        """The lines of an attempt; `look` is how the job stands. Raises NoLog."""
        view, pods = await self._started(look, key, which, follow)
        if not pods:
            for line in _what_is_left(view, which.attempt):
                yield line
            return
        script = _FOLLOW if follow else _READ
        if which.everyone:
            stream = _merged([self._lines(key, pod, script) for pod in pods])
        elif not follow or _is_shared(pods[0]):
            stream = self._lines(key, await self._rank_0(key, pods), script)
        else:
            stream = self._followed(look, key, _attempt(view, which.attempt) or 1, pods)
        async with aclosing(stream) as lines:
            async for line in lines:
                yield line

    async def _followed(self, look: Look, key: Key, number: int, pods: Sequence[Document]) -> AsyncGenerator[LogLine]:
        """Rank 0's lines, in whichever pod it is: when workers are lost or come back, another may have it."""
        told = ""
        while True:
            if pods:
                try:
                    pod, since, is_new = await self._rank_0(key, pods), told, not told
                    stream = self._lines(key, pod, _FOLLOW)
                    async with aclosing(_until(self._moved(key, number, pod), stream)) as lines:
                        async for line in lines:
                            if at := _TIME.match(line.text):
                                is_new, told = at[0] > since, max(told, at[0])
                            if is_new:  # what it wrote before it had the rank is not rank 0's
                                yield line
                except ClientError:
                    if not told:
                        raise
            view = await look()
            if view.is_settled or _has_ended(view, number):
                return
            await asyncio.sleep(_LOOK_SECONDS)
            pods = [one for one in await self._running(key, number) if _role(one) == WORKER]

    async def _moved(self, key: Key, number: int, pod: Document) -> None:
        """Returns when another pod than this has rank 0."""
        while True:
            await asyncio.sleep(_MOVED_SECONDS)
            with suppress(ClientError):
                pods = await self._running(key, number)
                if pods and _name(await self._rank_0(key, pods)) != _name(pod):
                    return

    async def _started(
        self, look: Look, key: Key, which: LogChoice, follow: bool
    ) -> tuple[JobView, Sequence[Document]]:
        """The job and the attempt's pods that run; when following, some time after both began."""
        while True:
            view = await look()
            number = _attempt(view, which.attempt)
            pods = await self._running(key, number) if number is not None else []
            ended = view.is_settled or (number is not None and _has_ended(view, number))
            # Rank 0 is among the workers: with the head alone there is nothing to choose from yet.
            if any(_role(pod) == WORKER for pod in pods) or not follow or ended:
                return view, pods
            await asyncio.sleep(_LOOK_SECONDS)

    async def _running(self, key: Key, attempt: int) -> list[Document]:
        selector = f"{JOB_LABEL}={key.name},{ATTEMPT_LABEL}={attempt}"
        path = POD.path(key.namespace)
        page = await self._send("GET", path, key, "list pods", query={"labelSelector": selector})
        running = [pod for pod in items(page, "items") if text(pod, "status", "phase") == "Running"]
        return sorted(running, key=lambda pod: (_role(pod) != HEAD, _name(pod)))

    async def _rank_0(self, key: Key, pods: Sequence[Document]) -> Document:
        """The pod whose trainer.log is the one that people mean.

        Of an elastic job several may have been rank 0, in one group after the other: the newest line tells. Lines begin
        with their time.
        """
        workers = [pod for pod in pods if _role(pod) == WORKER]
        if _is_shared(pods[0]) or not workers:
            return pods[0]
        if len(workers) == 1:
            return workers[0]
        last = await asyncio.gather(*(self._printed(key, pod, _LAST_OF_RANK_0) for pod in workers))
        return workers[last.index(max(last))]

    async def _printed(self, key: Key, pod: Document, script: str) -> str:
        return "\n".join([line.text async for line in self._lines(key, pod, script)])

    async def _lines(self, key: Key, pod: Document, script: str) -> AsyncGenerator[LogLine]:
        rest = b""
        async with aclosing(self._run(key, pod, script)) as pieces:
            async for channel, piece in pieces:
                if channel == _STDOUT:
                    *whole, rest = (rest + piece).split(b"\n")
                    for line in whole:
                        yield LogLine(_name(pod), line.decode(errors="replace"))
        if rest:
            yield LogLine(_name(pod), rest.decode(errors="replace"))

    async def _run(self, key: Key, pod: Document, script: str) -> AsyncGenerator[tuple[int, bytes]]:
        """A shell's output in the pod's container."""
        command = [("command", part) for part in ("sh", "-c", script)]
        query = [("container", RAY_CONTAINER), ("stdout", "true"), ("stderr", "true"), *command]
        try:
            path = f"{POD.path(key.namespace, _name(pod))}/exec"
            async with aclosing(self._connection.output(path, query)) as pieces:
                async for channel, piece in pieces:
                    yield channel, piece
        except ClusterError as error:
            doing = f"read the log in pod {_name(pod)} (pods/exec)"
            raise error_for(error, self._connection.host, key, doing) from error


async def _until(happens: Coroutine[Any, Any, None], stream: AsyncGenerator[LogLine]) -> AsyncGenerator[LogLine]:
    """The lines of a stream until it ends, or until that has happened."""
    end, line = asyncio.create_task(happens), asyncio.ensure_future(anext(stream, None))
    try:
        while not end.done():
            await asyncio.wait({line, end}, return_when=asyncio.FIRST_COMPLETED)
            if line.done():
                if (read := line.result()) is None:
                    return
                yield read
                line = asyncio.ensure_future(anext(stream, None))
    finally:
        for task in (end, line):
            task.cancel()
        await asyncio.gather(end, line, return_exceptions=True)
        await stream.aclose()


async def _merged(streams: Sequence[AsyncGenerator[LogLine]]) -> AsyncGenerator[LogLine]:
    """The lines of all streams as they come, until all have ended."""
    queue: asyncio.Queue[LogLine | None] = asyncio.Queue(maxsize=1000)

    async def pump(stream: AsyncGenerator[LogLine]) -> None:
        try:
            async for line in stream:
                await queue.put(line)
        finally:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            line = await queue.get()
            if line is None:
                left -= 1
            else:
                yield line
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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


def _what_is_left(view: JobView, asked: int | None) -> list[LogLine]:
    """What the status kept of an attempt whose pods are gone. Raises NoLog where that is nothing."""
    number = _attempt(view, asked)
    if number is None:
        raise NoLog(f"job {view.name} has not started; finetune describe {view.name} -n {view.namespace} says why")
    found = view.status.post_mortem
    if found is not None and found.attempt == number and found.message:
        return [LogLine(_POST_MORTEM, line) for line in found.message.splitlines()]
    if _has_ended(view, number):
        raise NoLog(
            f"the pods of attempt {number} are gone, and their log with them, unless the runtime's storage is a claim: "
            f"trainer.log is in {view.namespace}/{view.name}/attempt-{number} there"
        )
    raise NoLog(f"attempt {number} has no running pod yet; -f waits for one")


def _is_shared(pod: Document) -> bool:
    """Whether the run's folder is one for all pods; one of the pod's own is below SCRATCH."""
    containers = [one for one in items(at(pod, "spec"), "containers") if text(one, "name") == RAY_CONTAINER]
    variables = {text(one, "name"): text(one, "value") for container in containers for one in items(container, "env")}
    return not variables.get("FINETUNE_WORKDIR", SCRATCH).startswith(SCRATCH)


def _role(pod: Document) -> str:
    return text(at(pod, "metadata", "labels"), ROLE_LABEL)


def _name(pod: Document) -> str:
    return text(pod, "metadata", "name")
