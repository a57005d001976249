"""A server on this machine: starts the trainers' `serve` as a process of its own, asks it how it is, and ends it.

Called by `finetune serve`. The process says what it prepares on its standard output, a JSON object a line, and at last
where it will listen; whether it does is asked over HTTP. What else it prints goes where this process's stderr goes.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from finetune_client import runner
from finetune_client.guardian import guarded
from finetune_client.processes import RUN_MARK, ProcessTree

__all__ = ["LocalServer", "Serving"]

STOP_SECONDS = 15.0
"""How long the server may take to end by itself."""
_ASK_SECONDS = 2.0
_LOOK_SECONDS = 1.0
_PIECE = 1 << 16
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
"""Every address of the machine, and the one at which this machine asks."""


@dataclass(frozen=True)
class Serving:
    """Where a server listens, or will."""

    engine: str
    model: str
    """What those who ask call it."""
    host: str
    port: int

    @property
    def address(self) -> str:
        """Where this machine's programs ask."""
        return _ANYWHERE.get(self.host, self.host)

    @property
    def url(self) -> str:
        """What OpenAI's clients call the base URL."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}/v1"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can ask."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class LocalServer:
    """One server. Use it as a context: leaving it leaves no process."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """`arguments` of the trainers' command."""
        self._arguments = list(arguments)
        self._mark = uuid.uuid4().hex
        self._rest = b""
        self._looked_at = 0.0
        self.serving: Serving | None = None
        """Known when all is prepared, and the server loads."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [*runner.TRAINERS, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # SPT_NOENV: some servers rename their processes and would write over the mark.
            env=os.environ | {RUN_MARK: self._mark, "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1"},
            # A session of its own: the terminal's Ctrl-C reaches us, who end it in good order.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        os.set_blocking(self._out, False)
        self._tree = ProcessTree(self._process.pid, self._mark)
        self._guardian = guarded(self._process.pid, self._mark, STOP_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(lambda: kind is not None)

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -n where signal n ended it."""
        return self._process.poll()

    def said(self) -> list[str]:
        """What it prepares, since the last call."""
        self._look()
        pieces = [self._rest]
        with suppress(BlockingIOError):
            while piece := os.read(self._out, _PIECE):
                pieces.append(piece)
        *lines, self._rest = b"".join(pieces).split(b"\n")
        return [sentence for line in lines if (sentence := self._heard(line)) is not None]

    def answers(self) -> bool:
        """Whether it is ready to be asked."""
        if self.serving is None:
            return False
        connection = http.client.HTTPConnection(self.serving.address, self.serving.port, timeout=_ASK_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def end(self, at_once: Callable[[], bool] = lambda: False) -> None:
        """See to it that neither the server nor anything that it started is left; `at_once` is asked again and again
        whether there is no more time to be lost. May be called twice."""
        deadline = time.monotonic() + STOP_SECONDS
        if self._process.poll() is None:
            self._tree.look()
            self._process.send_signal(signal.SIGTERM)  # unlike SIGINT it ends a Python that still imports in silence
        while self._process.poll() is None and time.monotonic() < deadline and not at_once():
            time.sleep(0.05)
        if self._process.poll() is None:
            self._tree.kill()
            self._process.wait()
        if self._guardian.returncode is None:
            self._tree.clean_up()
            self._guardian.communicate(b"x")
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _look(self) -> None:
        if time.monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._tree.look()
            self._looked_at = time.monotonic()

    def _heard(self, line: bytes) -> str | None:
        """A sentence for people; anything that is not of the protocol is one."""
        try:
            document: dict[str, Any] = json.loads(line)
            if "serving" in document:
                self.serving = Serving(**document["serving"])
                return None
            return str(document["say"])
        except (ValueError, KeyError, TypeError):
            return line.decode(errors="replace")
