"""One pod's trainer.log: all that is there, or that and what comes, over connections that may be cut.

Used by `pod_logs`. A container's own output is Ray's, not ours, so the file is read by a command in the container:
that needs the right to `pods/exec`, as `kubectl exec` does. Of every line it is known where in the file it ends, so
reading goes on from there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from finetune_client.backends.patience import Patience
from finetune_client.backends.refusals import error_for
from finetune_client.errors import ClientError, NoLog, NotAllowed, Refused
from finetune_operator.cluster.connection import Connection
from finetune_operator.errors import ClusterError, NotFound
from finetune_operator.kinds import POD, Key
from finetune_operator.names import RAY_CONTAINER

__all__ = ["LOOK_SECONDS", "Line", "PodTail"]

LOOK_SECONDS = 2.0
"""Between two tries."""
_STDOUT, _STDERR, _END = 1, 2, 3
_LOG = '"$FINETUNE_WORKDIR/trainer.log"'
_READ = f"test -e {_LOG} && tail -c +{{}} {_LOG}"
_FOLLOW = f"exec tail -c +{{}} -F {_LOG} 2>/dev/null"
_LAST_OF_RANK_0 = f"grep ' worker 0 ' {_LOG} | tail -n 1"


class Line(NamedTuple):
    """A line of a log."""

    text: str
    end: int
    """How many bytes of the file come before the next one."""


class PodTail:
    """Reads logs in pods, through the API server."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def written(self, key: Key, pod: str, start: int) -> AsyncGenerator[Line]:
        """What there is from byte `start` on. Raises NoLog where nothing was written yet."""
        rest, end, is_there = b"", start, False
        try:
            async with aclosing(self._printed(key, pod, _READ.format(start + 1))) as pieces:
                async for piece in pieces:
                    *whole, rest = (rest + piece).split(b"\n")
                    is_there = is_there or bool(whole or rest)
                    for line in whole:
                        end += len(line) + 1
                        yield _line(line, end)
        except _Failed as failed:
            if is_there or str(failed):
                raise Refused(f"the log in pod {pod} cannot be read: {failed}") from failed
            raise NoLog(f"the trainers in pod {pod} have written no log yet") from failed
        if rest:
            yield _line(rest, end + len(rest))

    async def growing(self, key: Key, pod: str, start: int) -> AsyncGenerator[Line | None]:
        """What there is from byte `start` on, and what comes, until it is left; None whenever a connection has ended.

        Raises NotAllowed, and what is wrong with a pod that cannot be read for a minute.
        """
        patience, end = Patience(), start
        while True:
            rest, is_open = b"", False
            try:
                async with aclosing(self._printed(key, pod, _FOLLOW.format(end + 1))) as pieces:
                    async for piece in pieces:
                        is_open = True  # the first is empty, and comes when the command begins
                        *whole, rest = (rest + piece).split(b"\n")
                        for line in whole:
                            end += len(line) + 1
                            yield _line(line, end)
                            patience.renew()
            except _Failed as failed:
                patience.spend(Refused(f"the log in pod {pod} cannot be read: {failed}"))
            except ClientError as error:
                if not is_open:  # one that was cut has worked until then
                    patience.spend(error)
            yield None
            await asyncio.sleep(LOOK_SECONDS)

    async def last_of_rank_0(self, key: Key, pod: str) -> str:
        """The last line that rank 0 has written there; empty where it has written none, or nobody can tell."""
        printed = b""
        try:
            async with aclosing(self._printed(key, pod, _LAST_OF_RANK_0)) as pieces:
                async for piece in pieces:
                    printed += piece
        except NotAllowed:
            raise
        except (ClientError, _Failed):
            return ""
        return printed.decode(errors="replace").rstrip("\n")

    async def _printed(self, key: Key, pod: str, script: str) -> AsyncGenerator[bytes]:
        """What a shell in the pod's container prints. Raises _Failed where that ends with an error."""
        command = [("command", part) for part in ("sh", "-c", script)]
        query = [("container", RAY_CONTAINER), ("stdout", "true"), ("stderr", "true"), *command]
        said, ending = b"", b""
        try:
            async with aclosing(self._connection.output(f"{POD.path(key.namespace, pod)}/exec", query)) as pieces:
                async for channel, piece in pieces:
                    if channel == _STDOUT:
                        yield piece
                    elif channel == _STDERR:
                        said += piece
                    elif channel == _END:
                        ending += piece
        except NotFound as error:
            raise Refused(f"pod {pod} is gone, and its log with it") from error
        except ClusterError as error:
            doing = f"read the log in pod {pod} (pods/exec)"
            raise error_for(error, self._connection.host, key, doing) from error
        _check(ending, said)


class _Failed(Exception):
    """The command ended with an error; the message is what it said, if anything."""


def _check(ending: bytes, said: bytes) -> None:
    """`ending` is a Status as JSON. A plain exit code says nothing that a person needs to know."""
    try:
        status = json.loads(ending or b"{}")
    except ValueError:
        status = {}
    if status.get("status") == "Failure":
        told = "" if status.get("reason") == "NonZeroExitCode" else str(status.get("message") or "")
        raise _Failed(said.decode(errors="replace").strip() or told)


def _line(line: bytes, end: int) -> Line:
    return Line(line.decode(errors="replace"), end)
