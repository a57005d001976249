"""One API server over HTTP: where it is, whether to trust it, who we are, and JSON there and back.

`cluster.kubernetes` speaks through it and `__main__` opens it; how to reach the cluster says `cluster.login`. The
requests are aiohttp's own: the official client's models would turn each document into objects and back, and refuse
fields they do not know.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from pathlib import Path
from socket import socket
from typing import Any
from weakref import WeakSet

import aiohttp
from pydantic_core import from_json

from finetune_operator.cluster.login import Login
from finetune_operator.errors import ApiError, Unreachable, api_error
from finetune_operator.metrics import Metrics
from finetune_operator.raw import at, items

__all__ = ["JSON", "Connection", "Sockets", "connect"]

JSON = "application/json"

_CONNECTIONS = 100  # HTTP/1.1: a request has one to itself, a watch for as long as it lasts
_CONNECT_SECONDS = 10.0
_FAREWELL_SECONDS = 2.0
_READ_AT_ONCE = 1 << 18
_CHANNELS = "v4.channel.k8s.io"
"""How a command's streams share one WebSocket: the first byte of each message says whose it is."""
_END_CHANNEL = 3
_HANDSHAKE_SECONDS = 30.0
_HEARTBEAT_SECONDS = 30.0
"""Between two questions whether the other end is still there: a command may have nothing to say for hours."""
_LONGEST_MESSAGE = 2000
_DEEPEST = 21_000
"""Calls: two for a level of nesting, and some for us. An API server takes ten thousand levels, and what one job holds
of them must not end the watch over all."""


@asynccontextmanager
async def connect(
    kubeconfig: Path | None = None, context: str | None = None, metrics: Metrics | None = None
) -> AsyncIterator[Connection]:
    """A connection as `kubeconfig` says, or $KUBECONFIG, the pod's service account, or ~/.kube/config.

    Raises Unusable. Nothing is asked of the server yet.
    """
    login = Login(kubeconfig, context)
    await login.load()
    sockets = Sockets()
    connector = aiohttp.TCPConnector(limit=_CONNECTIONS, ssl=login.tls or True, socket_factory=sockets.new)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
    try:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_READ_AT_ONCE) as session:
            yield Connection(session, login, metrics or Metrics())
    finally:
        await sockets.closed()


class Sockets:
    """The sockets of a session. One over TLS takes leave of the server before it is closed, which the end of the
    session does not wait for when its answer was left early: a loop that ends then would leave it open."""

    def __init__(self) -> None:
        self._made = WeakSet[socket]()

    def new(self, address: tuple[int, int, int, str, tuple[Any, ...]]) -> socket:
        """aiohttp's socket_factory; `address` as socket.getaddrinfo gives it."""
        made = socket(*address[:3])
        self._made.add(made)
        return made

    async def closed(self) -> None:
        """Returns when all are closed, or after some seconds: a server may never answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                while any(one.fileno() >= 0 for one in self._made):
                    await asyncio.sleep(0.005)


class Connection:
    """Sends requests, counts them, and turns every way to fail into one of `errors`."""

    def __init__(self, session: aiohttp.ClientSession, login: Login, metrics: Metrics) -> None:
        """Made by `connect`."""
        self._session = session
        self._login = login
        self._metrics = metrics

    @property
    def host(self) -> str:
        """The server's address, as its metrics have it."""
        return str(self._login.configuration.host)

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = JSON,
        seconds: float = 30,
    ) -> Any:
        """The JSON that answers; Unreachable when it takes longer than `seconds`."""
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
        async with self._answered(method, method, path, query, body, content_type, timeout) as response:
            return _parsed(await response.read())

    async def lines(
        self, path: str, query: Mapping[str, str], silence: float | None = None
    ) -> AsyncGenerator[Any, None]:
        """Each line of an answer that comes as long as the server likes, as JSON. However long a line is.

        Raises Unreachable when nothing comes for `silence` seconds.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=silence)
        async with self._answered("WATCH", "GET", path, query, None, JSON, timeout) as response:
            parts: list[bytes] = []
            async for chunk in response.content.iter_any():
                *ends, rest = chunk.split(b"\n")
                for end in ends:
                    line, parts = b"".join([*parts, end]), []
                    if line:
                        yield _parsed(line)
                if rest:
                    parts.append(rest)

    async def output(self, path: str, query: Sequence[tuple[str, str]]) -> AsyncGenerator[tuple[int, bytes]]:
        """What a command in a container prints, piece by piece: 1 and stdout, 2 and stderr, 3 and the end.

        `path` is a pod's exec, which the server answers over a WebSocket. Raises Unreachable where that is cut, or
        falls silent for good, before the end was told.
        """
        is_ended, broken = False, None
        try:
            async with await self._socket(path, query) as socket:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.BINARY and message.data:
                        yield message.data[0], message.data[1:]
                        is_ended = message.data[0] == _END_CHANNEL
                broken = socket.exception()
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"GET {path}: {str(error) or 'no answer in time'}") from error
        if not is_ended:
            raise Unreachable(f"GET {path}: the connection was cut{f': {broken}' if broken else ''}")

    async def _socket(self, path: str, query: Sequence[tuple[str, str]]) -> aiohttp.ClientWebSocketResponse:
        """Asks again once after a new login where the server no longer knows us."""
        for is_last in (False, True):
            begun_at = asyncio.get_running_loop().time()
            headers, options = await self._login.headers(), self._login.options()
            try:
                async with asyncio.timeout(_HANDSHAKE_SECONDS):
                    socket: aiohttp.ClientWebSocketResponse = await self._session.ws_connect(
                        self.host + path,
                        params=query,
                        protocols=(_CHANNELS,),
                        headers=headers,
                        heartbeat=_HEARTBEAT_SECONDS,
                        timeout=aiohttp.ClientWSTimeout(ws_close=_FAREWELL_SECONDS),
                        max_msg_size=0,
                        **options,
                    )
                    return socket
            except aiohttp.WSServerHandshakeError as error:
                if error.status == HTTPStatus.UNAUTHORIZED and not is_last and await self._login.renew(begun_at):
                    continue
                raise api_error(error.status, HTTPStatus(error.status).phrase, f"GET {path} was refused") from error
        raise AssertionError("the last answer is returned or raised")

    @asynccontextmanager
    async def _answered(
        self,
        verb: str,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Any,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer below 400. Asks again once after a new login where the server no longer knows us."""
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        try:
            for is_last in (False, True):
                begun_at = asyncio.get_running_loop().time()
                headers = {"Accept": JSON, **({"Content-Type": content_type} if data is not None else {})}
                headers |= await self._login.headers()
                options = self._login.options()
                async with self._session.request(
                    method, self.host + path, params=query, data=data, headers=headers, timeout=timeout, **options
                ) as response:
                    self._metrics.request_seconds.labels(verb, self.host).observe(
                        asyncio.get_running_loop().time() - begun_at
                    )
                    self._metrics.requests.labels(str(response.status), method, self.host).inc()
                    if response.status == HTTPStatus.UNAUTHORIZED and not is_last and await self._login.renew(begun_at):
                        continue
                    if response.status >= HTTPStatus.BAD_REQUEST:
                        raise _refusal(response, await response.read())
                    yield response
                    return
        except (aiohttp.ClientError, OSError) as error:
            # TimeoutError is an OSError. One raised in the caller's block comes through here too, as it should:
            # reading on is part of the request.
            self._metrics.requests.labels("<error>", method, self.host).inc()
            raise Unreachable(f"{method} {path}: {str(error) or 'no answer in time'}") from error


class _DeepDecoder(json.JSONDecoder):
    """All in Python: from 3.12 on the decoder in C counts its calls by itself, and 3.12 gives up at 1,500 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.scan_once: Any = py_make_scanner(self)


def _parsed(text: bytes) -> Any:
    """Words that come again and again, above all names of fields, are held once for all objects of all watches."""
    try:
        return from_json(text, cache_strings="all")
    except ValueError:
        pass  # nested more deeply than it reads, or no JSON
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(_DEEPEST)
    try:
        return _DeepDecoder().decode(text.decode())
    except (ValueError, RecursionError):
        raise Unreachable(f"something that is no API server answered: {text[:200]!r}") from None
    finally:
        sys.setrecursionlimit(usual)


def _refusal(response: aiohttp.ClientResponse, text: bytes) -> ApiError:
    """The error for an answer of 400 and above, which is a Status unless something on the way has answered."""
    try:
        status = json.loads(text)
    except (ValueError, RecursionError):
        status = None
    status = status if isinstance(status, dict) else {"message": text.decode(errors="replace").strip()}
    message = str(status.get("message") or response.reason)[:_LONGEST_MESSAGE]
    error = api_error(response.status, str(status.get("reason") or response.reason), message, _retry_after(response))
    causes = [one for one in items(at(status, "details"), "causes") if isinstance(one, dict)]
    error.causes = [(str(one.get("field", "")), str(one.get("message", ""))) for one in causes]
    return error


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds; the API server never writes the other form, a date."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None
