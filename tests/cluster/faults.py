"""A proxy on loopback between a program and its API server, which can be told to misbehave.

    with fault_proxy(server) as faults:                       # give faults.kubeconfig to the program
        with faults.rule(Refuse(409), verb="update", times=3):
            ...
        assert faults.writes() == []

It ends TLS with the server's own certificate, so that a client which trusts the server trusts the proxy. Requests
that no rule strikes pass unchanged, watches event by event. It runs on a thread of its own, so tests may be plain
functions or coroutines.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.cluster.processes import reserved_ports
from tests.cluster.proxy import Action, Exchange, Proxy, status_document
from tests.cluster.requests import Asked
from tests.cluster.server import Server

__all__ = [
    "CutWatch",
    "Delay",
    "Drop",
    "FailWatch",
    "Faults",
    "Freeze",
    "LoseAnswer",
    "Refuse",
    "Respond",
    "Rule",
    "fault_proxy",
    "proxy_to",
]


@dataclass(frozen=True)
class Refuse:
    """Answers with `code` instead of asking the server. `retry_after` in seconds."""

    code: int
    retry_after: int | None = None
    message: str = "refused by a test"

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        return exchange.status(self.code, self.message, retry_after=self.retry_after)


@dataclass(frozen=True)
class Delay:
    """Waits, then passes the request on."""

    seconds: float

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        await asyncio.sleep(self.seconds)
        return await exchange.forward()


@dataclass(frozen=True)
class Drop:
    """Closes the connection before the server has heard of the request."""

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        return exchange.abort()


@dataclass(frozen=True)
class LoseAnswer:
    """The server carries the request out; the connection is closed before the answer."""

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        await exchange.ask_and_forget()
        return exchange.abort()


@dataclass(frozen=True)
class CutWatch:
    """Passes `events` events on, then closes the connection: in the middle of the stream, or at its proper end."""

    events: int = 0
    cleanly: bool = False

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        response = await exchange.forward(self.events)
        return response if self.cleanly else exchange.abort()


@dataclass(frozen=True)
class FailWatch:
    """Passes `events` events on, then an ERROR event with `code`: 410 is how a server says that history is gone."""

    code: int = 410
    events: int = 0

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        response = await exchange.forward(self.events)
        error = {"type": "ERROR", "object": status_document(self.code, "too old resource version (said by a test)")}
        await response.write(json.dumps(error).encode() + b"\n")
        return response


@dataclass(frozen=True)
class Freeze:
    """Half-open: after `events` events of a watch, or before any other answer, nothing more comes, nor an end."""

    events: int = 0

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        if exchange.asked.verb == "watch":
            await exchange.forward(self.events)
        await asyncio.Event().wait()  # until the client leaves or the proxy stops
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class Respond:
    """Answers by itself: `answer` takes the request and its body, and returns a code and a JSON document.

    It is called on a thread where it may take its time.
    """

    answer: Callable[[Asked, bytes], tuple[int, object]]

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        body = await exchange.request.content.read()
        code, document = await asyncio.to_thread(self.answer, exchange.asked, body)
        return web.json_response(document, status=code)


@dataclass
class Rule:
    """Which requests an action strikes: None fits all, verb "write" fits whatever changes an object."""

    action: Action
    verb: str | None = None
    resource: str | None = None
    name: str | None = None
    namespace: str | None = None
    path: str | None = None
    """The start of the path."""
    times: int | None = None
    """How many requests are struck before the rule is spent."""
    after: int = 0
    """How many that fit pass first."""
    struck: int = field(default=0, init=False)
    passed: int = field(default=0, init=False)

    def strikes(self, asked: Asked) -> bool:
        """Whether the action is to be taken; counts."""
        if not self._fits(asked) or (self.times is not None and self.struck >= self.times):
            return False
        if self.passed < self.after:
            self.passed += 1
            return False
        self.struck += 1
        return True

    def _fits(self, asked: Asked) -> bool:
        wanted = {"resource": self.resource, "name": self.name, "namespace": self.namespace}
        return (
            (self.verb in (None, asked.verb) or (self.verb == "write" and asked.writes))
            and all(value is None or value == getattr(asked, key) for key, value in wanted.items())
            and (self.path is None or asked.path.startswith(self.path))
        )


class Faults:
    """The proxy as a test holds it."""

    def __init__(self, url: str, proxy: Proxy, thread: _Thread, told: _Told, server: Server | None) -> None:
        self.url = url
        self._proxy, self._thread, self._told, self._server = proxy, thread, told, server

    @property
    def server(self) -> Server:
        """The server behind the proxy, at the proxy's address."""
        assert self._server is not None, "this proxy stands before something else"
        return self._server.at(self.url)

    @property
    def kubeconfig(self) -> Path:
        """For a program that is to go through the proxy."""
        return self.server.kubeconfig

    def add(self, rule: Rule) -> Rule:
        """The first rule that strikes counts; later ones come after earlier ones."""
        self._told.rules.append(rule)
        return rule

    def clear(self) -> None:
        """No rules any more."""
        self._told.rules.clear()

    @contextmanager
    def rule(
        self,
        action: Action,
        *,
        verb: str | None = None,
        resource: str | None = None,
        name: str | None = None,
        namespace: str | None = None,
        path: str | None = None,
        times: int | None = None,
        after: int = 0,
    ) -> Iterator[Rule]:
        """A rule for the length of a block; `rule.struck` says how often it was used."""
        rule = self.add(Rule(action, verb, resource, name, namespace, path, times, after))
        try:
            yield rule
        finally:
            with suppress(ValueError):  # cleared meanwhile
                self._told.rules.remove(rule)

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Connections are closed and new ones refused, as when nothing listens."""
        self._thread.run(self._proxy.close_listener())
        try:
            yield
        finally:
            self._thread.run(self._proxy.listen())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stay open and nothing moves, in running watches either."""
        self._thread.run(self._proxy.hold())
        try:
            yield
        finally:
            self._thread.run(self._proxy.release())

    def cut(self) -> None:
        """Closes every connection that is open now; new ones are welcome."""
        self._thread.run(self._proxy.abort_connections())

    @property
    def seen(self) -> list[Asked]:
        """Every request so far, those that a rule struck included."""
        return list(self._told.seen)

    def counts(self) -> Counter[tuple[str, str]]:
        """How many requests came, by verb and resource."""
        return Counter((asked.verb, asked.resource) for asked in self.seen)

    def writes(self, *, but: tuple[str, ...] = ()) -> list[Asked]:
        """Requests that would change an object; `but` names resources to leave out, such as "leases"."""
        return [asked for asked in self.seen if asked.writes and asked.resource not in but]

    def forget(self) -> None:
        """Counts start anew."""
        self._told.seen.clear()


@contextmanager
def fault_proxy(server: Server) -> Iterator[Faults]:
    """A proxy in front of an API server, with its certificate."""
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(server.ca_file, server.key_file)
    theirs = ssl.create_default_context(cafile=str(server.ca_file))
    with proxy_to(server.url, ours, theirs, server) as faults:
        yield faults


@contextmanager
def proxy_to(
    upstream: str,
    ours: ssl.SSLContext | None = None,
    theirs: ssl.SSLContext | None = None,
    server: Server | None = None,
) -> Iterator[Faults]:
    """A proxy in front of any HTTP server; without `ours` it speaks plain HTTP itself."""
    told = _Told()
    with _Thread() as thread, reserved_ports(1) as (port,):
        proxy = Proxy(upstream, port, told.choose, ours, theirs)
        thread.run(proxy.start())
        try:
            yield Faults(f"{'https' if ours else 'http'}://127.0.0.1:{port}", proxy, thread, told, server)
        finally:
            thread.run(proxy.stop())


@dataclass
class _Told:
    """What the test has told the proxy and the proxy the test; the two are on different threads."""

    rules: list[Rule] = field(default_factory=list)
    seen: list[Asked] = field(default_factory=list)

    def choose(self, asked: Asked) -> Action | None:
        """Notes the request and finds what to do with it."""
        self.seen.append(asked)
        return next((rule.action for rule in list(self.rules) if rule.strikes(asked)), None)


class _Thread:
    """An event loop on a thread of its own."""

    def __enter__(self) -> _Thread:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, what: Coroutine[Any, Any, None]) -> None:
        """Runs it there and waits for its end."""
        asyncio.run_coroutine_threadsafe(what, self._loop).result(30)
