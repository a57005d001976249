"""The reverse proxy that tests.cluster.faults puts rules on: one listener, one server behind it, any HTTP.

Everything here runs on one event loop.
"""

from __future__ import annotations

import ssl
from asyncio import Event
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

from finetune_operator.cluster.connection import Sockets
from tests.cluster.requests import Asked, asked_by

__all__ = ["Action", "Exchange", "Proxy", "status_document"]

_OF_ONE_HOP = frozenset({"connection", "host", "keep-alive", "transfer-encoding", "upgrade"})
_NOT_OUR_OWN = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that the HTTP client would add where the request has none: the answer would then not fit the request."""
_REASONS = {409: "Conflict", 410: "Expired", 422: "Invalid", 429: "TooManyRequests", 500: "InternalError"}


@dataclass(frozen=True)
class Exchange:
    """One request on its way through the proxy, for an action to deal with."""

    request: web.BaseRequest
    asked: Asked
    proxy: Proxy

    async def forward(self, events: int | None = None) -> web.StreamResponse:
        """Passes it on and the answer back; of a watch only so many `events`, bookmarks not counted."""
        async with self.proxy.ask(self.request) as answer:
            response = web.StreamResponse(status=answer.status, headers=_passed_on(answer.headers))
            await response.prepare(self.request)
            async for piece in _body(answer, events):
                await self.proxy.flowing.wait()
                await response.write(piece)
            return response

    async def ask_and_forget(self) -> None:
        """Has the server carry it out; nobody hears the answer."""
        async with self.proxy.ask(self.request) as answer:
            await answer.read()

    def status(self, code: int, message: str, reason: str = "", retry_after: int | None = None) -> web.Response:
        """A refusal in the API server's own form."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return web.json_response(status_document(code, message, reason), status=code, headers=headers)

    def abort(self) -> web.Response:
        """Closes the connection without a word. What is returned goes nowhere."""
        if self.request.transport is not None:
            self.request.transport.abort()
        return web.Response()


class Action(Protocol):
    """What a rule does with a request."""

    async def __call__(self, exchange: Exchange) -> web.StreamResponse: ...


class Proxy:
    """`choose` is asked for every request; None lets it pass."""

    def __init__(
        self,
        upstream: str,
        port: int,
        choose: Callable[[Asked], Action | None],
        ours: ssl.SSLContext | None,
        theirs: ssl.SSLContext | None,
    ) -> None:
        self.flowing = Event()
        self._upstream, self._port, self._choose, self._ours, self._theirs = upstream, port, choose, ours, theirs
        self._site: web.TCPSite | None = None
        self._listening = False
        self._sockets = Sockets()

    async def start(self) -> None:
        self.flowing.set()
        connector = TCPConnector(limit=0, ssl=self._theirs or True, socket_factory=self._sockets.new)
        self._session = ClientSession(connector=connector, auto_decompress=False, timeout=ClientTimeout(total=None))
        self._web = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(self._web, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen()

    async def stop(self) -> None:
        self.flowing.set()
        await self.abort_connections()
        await self._runner.cleanup()
        await self._session.close()
        await self._sockets.closed()

    async def hold(self) -> None:
        """Connections stay open and nothing moves until `release`."""
        self.flowing.clear()

    async def release(self) -> None:
        self.flowing.set()

    async def listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._ours)
        await self._site.start()
        self._listening = True

    async def close_listener(self) -> None:
        self._listening = False
        if self._site is not None:
            await self._site.stop()
        await self.abort_connections()

    async def abort_connections(self) -> None:
        for connection in list(self._web.connections):
            if connection.transport is not None:
                connection.transport.abort()

    @asynccontextmanager
    async def ask(self, request: web.BaseRequest) -> AsyncIterator[ClientResponse]:
        """The server's answer to the same request."""
        url = URL(self._upstream + request.raw_path, encoded=True)
        body = await request.content.read()
        headers = _passed_on(request.headers)
        async with self._session.request(
            request.method,
            url,
            headers=headers,
            data=body or None,
            allow_redirects=False,
            skip_auto_headers=_NOT_OUR_OWN,
        ) as answer:
            yield answer

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = asked_by(request.method, request.raw_path)
        exchange = Exchange(request, asked, self)
        if not self._listening:  # its connection was still being made when the others were closed
            return exchange.abort()
        action = self._choose(asked)
        await self.flowing.wait()
        try:
            return await (action(exchange) if action else exchange.forward())
        except ClientError:  # the server has gone, or the client has
            return exchange.abort()


async def _body(answer: ClientResponse, events: int | None) -> AsyncIterator[bytes]:
    """The answer's body, as it comes; or, of a watch in JSON, its first events."""
    if events is None:
        async for piece in answer.content.iter_any():
            yield piece
    elif events > 0:
        async for event in _lines(answer):
            yield event
            events -= not event.startswith(b'{"type":"BOOKMARK"')
            if not events:
                return


async def _lines(answer: ClientResponse) -> AsyncIterator[bytes]:
    """A watch has one event a line, of any length."""
    rest = b""
    async for piece in answer.content.iter_any():
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line + b"\n"


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in _OF_ONE_HOP}


def status_document(code: int, message: str, reason: str = "") -> dict[str, object]:
    """A refusal as the API server words it."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason or _REASONS.get(code, HTTPStatus(code).phrase.replace(" ", "")),
        "message": message,
    }
