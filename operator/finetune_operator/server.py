"""Answers Prometheus and the kubelet: /metrics, /healthz and /readyz, over plain HTTP and nothing more.

`__main__` starts one per replica and gives it the checks. A check returns None where all is well and otherwise what
is not, in a sentence. The page lists all checks; its status is 200 when all hold and 503 when one does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Self

from finetune_operator.metrics import CONTENT_TYPE, Metrics

__all__ = ["Check", "Server"]

Check = Callable[[], str | None]

_LARGEST_REQUEST = 8192
_PLAIN = "text/plain; charset=utf-8"
_log = logging.getLogger(__name__)


class Server:
    """`async with Server(...)` listens until the block ends."""

    def __init__(
        self,
        metrics: Metrics,
        host: str,
        port: int,
        *,
        ready: Mapping[str, Check],
        live: Mapping[str, Check] | None = None,
        request_seconds: float = 10,
    ) -> None:
        """Port 0 takes a free one. `live` must fail only for what a restart mends, `ready` for whatever is amiss."""
        self._host = host
        self._port = port
        self._request_seconds = request_seconds
        self._connections: set[asyncio.Task[None]] = set()
        self._pages: dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]] = {
            "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE, metrics.render()),
            "/healthz": lambda: _checked(live or {}),
            "/readyz": lambda: _checked(ready),
        }

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    async def __aenter__(self) -> Self:
        """OSError where the port is taken."""
        self._server = await asyncio.start_server(self._connected, self._host, self._port, limit=_LARGEST_REQUEST)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        await self._server.wait_closed()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._answer(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request on each connection; a caller that is slow, gone, or not speaking HTTP costs little."""
        try:
            async with asyncio.timeout(self._request_seconds):
                writer.write(await self._response(reader))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _response(self, reader: asyncio.StreamReader) -> bytes:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        words = request.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST)
        method, target, _ = words
        page = self._pages.get(target.split("?", 1)[0])
        if page is None:
            return _response(HTTPStatus.NOT_FOUND)
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, extra="Allow: GET, HEAD\r\n")
        try:
            status, content_type, body = page()
        except Exception:
            _log.exception("%s could not be made", target)
            return _response(HTTPStatus.INTERNAL_SERVER_ERROR)
        return _response(status, content_type, body, with_body=method == "GET")


def _response(
    status: HTTPStatus,
    content_type: str = _PLAIN,
    body: bytes | None = None,
    *,
    with_body: bool = True,
    extra: str = "",
) -> bytes:
    body = f"{status.phrase}\n".encode() if body is None else body
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + (body if with_body else b"")


def _checked(checks: Mapping[str, Check]) -> tuple[HTTPStatus, str, bytes]:
    problems = {name: _problem(check) for name, check in checks.items()}
    lines = [f"[+] {name}: ok" if problem is None else f"[-] {name}: {problem}" for name, problem in problems.items()]
    failed = any(problem is not None for problem in problems.values())
    lines.append("failed" if failed else "ok")
    return HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.OK, _PLAIN, ("\n".join(lines) + "\n").encode()


def _problem(check: Check) -> str | None:
    """A check that breaks has not held."""
    try:
        return check()
    except Exception as error:
        _log.exception("a check broke")
        return f"the check itself failed: {error}"
