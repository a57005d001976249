"""The proxy passes everything on as it is, and misbehaves as it is told; a small HTTP server stands behind it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.cluster.faults import (
    CutWatch,
    Delay,
    Drop,
    FailWatch,
    Faults,
    Freeze,
    LoseAnswer,
    Refuse,
    Respond,
    proxy_to,
)
from tests.cluster.requests import Asked

PODS = "/api/v1/namespaces/a/pods"
WATCH = f"{PODS}?watch=1"


class Upstream(ThreadingHTTPServer):
    """Answers with what it was sent; a watch gives five events and then stays open until `released`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.heard: list[tuple[str, str, bytes, dict[str, str]]] = []
        self.released = threading.Event()
        self.left = threading.Event()
        """Somebody closed a watch at the other end."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.heard.append((self.command, self.path, body, dict(self.headers)))
        if "watch=1" in self.path:
            self._watch()
            return
        answer = json.dumps({"path": self.path, "body": body.decode()}).encode()
        self.send_response(404 if "absent" in self.path else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 (the names are the base class's)

    def _watch(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b'{"type":"BOOKMARK"}\n{"type":"ADDED","object":1}\n{"type":"ADD')
        self._chunk(b'ED","object":2}\n')
        for number in (3, 4, 5):
            self._chunk(b'{"type":"ADDED","object":%d}\n' % number)
        while not self.server.released.wait(0.01):
            with suppress(BlockingIOError):
                if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    self.server.left.set()
                    return
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def faults(upstream: Upstream) -> Iterator[Faults]:
    with proxy_to(f"http://127.0.0.1:{upstream.server_port}") as faults:
        yield faults


def connection(faults: Faults, seconds: float = 30) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(faults.url.removeprefix("http://"), timeout=seconds)


def ask(faults: Faults, method: str, path: str, body: str | None = None) -> tuple[int, Any, http.client.HTTPMessage]:
    with closing(connection(faults)) as wire:
        wire.request(method, path, body)
        answer = wire.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers


def objects(answer: http.client.HTTPResponse, count: int) -> list[Any]:
    """What the next events hold, bookmarks left out."""
    found: list[Any] = []
    while len(found) < count:
        event = json.loads(answer.readline())
        if event["type"] != "BOOKMARK":
            found.append(event["object"])
    return found


def test_a_request_and_its_answer_pass_unchanged(faults: Faults, upstream: Upstream) -> None:
    code, document, _ = ask(faults, "PATCH", f"{PODS}/b%2Fc?x=%20y", "the body")
    assert (code, document) == (200, {"path": f"{PODS}/b%2Fc?x=%20y", "body": "the body"})
    ((method, path, body, headers),) = upstream.heard
    assert (method, path, body) == ("PATCH", f"{PODS}/b%2Fc?x=%20y", b"the body")
    assert "User-Agent" not in headers
    assert headers["Accept-Encoding"] == "identity"


def test_a_refusal_of_the_server_passes(faults: Faults) -> None:
    assert ask(faults, "GET", f"{PODS}/absent")[0] == 404


def test_the_events_of_a_watch_pass_while_it_goes_on(faults: Faults) -> None:
    with closing(connection(faults)) as wire:
        wire.request("GET", WATCH)
        assert objects(wire.getresponse(), 5) == [1, 2, 3, 4, 5]


def test_requests_are_counted_by_verb_and_resource(faults: Faults) -> None:
    ask(faults, "GET", PODS)
    ask(faults, "GET", PODS)
    ask(faults, "PUT", f"{PODS}/b/status")
    ask(faults, "POST", "/apis/coordination.k8s.io/v1/namespaces/a/leases")
    assert faults.counts() == {("list", "pods"): 2, ("update", "pods/status"): 1, ("create", "leases"): 1}
    assert [asked.resource for asked in faults.writes(but=("leases",))] == ["pods/status"]
    faults.forget()
    assert faults.seen == []


def test_a_refusal_comes_from_the_proxy_in_the_servers_own_form(faults: Faults, upstream: Upstream) -> None:
    with faults.rule(Refuse(429, retry_after=7), verb="update"):
        code, status, headers = ask(faults, "PUT", f"{PODS}/b")
    assert (code, status["kind"], status["code"], status["reason"]) == (429, "Status", 429, "TooManyRequests")
    assert headers["Retry-After"] == "7"
    assert upstream.heard == []


def test_a_rule_holds_for_its_block_and_what_it_names(faults: Faults) -> None:
    with faults.rule(Refuse(500), verb="get", resource="pods", namespace="a", name="b") as rule:
        struck = [
            ask(faults, "GET", path)[0] for path in (f"{PODS}/b", f"{PODS}/c", PODS, "/api/v1/namespaces/x/pods/b")
        ]
    assert struck == [500, 200, 200, 200]
    assert ask(faults, "GET", f"{PODS}/b")[0] == 200
    assert rule.struck == 1


def test_a_rule_lets_some_pass_strikes_some_and_is_spent(faults: Faults) -> None:
    with faults.rule(Refuse(409), verb="write", times=2, after=1):
        assert [ask(faults, "PUT", f"{PODS}/b")[0] for _ in range(5)] == [200, 409, 409, 200, 200]


def test_the_first_rule_that_strikes_counts(faults: Faults) -> None:
    with faults.rule(Refuse(409), times=1), faults.rule(Refuse(500)):
        assert [ask(faults, "GET", PODS)[0] for _ in range(2)] == [409, 500]
        faults.clear()
        assert ask(faults, "GET", PODS)[0] == 200


def test_a_watch_is_cut_in_the_middle(faults: Faults) -> None:
    with faults.rule(CutWatch(events=2), verb="watch"), closing(connection(faults)) as wire:
        wire.request("GET", WATCH)
        answer = wire.getresponse()
        assert objects(answer, 2) == [1, 2]
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            answer.read()


def test_a_watch_is_ended_as_a_server_ends_it(faults: Faults) -> None:
    with faults.rule(CutWatch(events=3, cleanly=True), verb="watch"), closing(connection(faults)) as wire:
        wire.request("GET", WATCH)
        answer = wire.getresponse()
        assert objects(answer, 3) == [1, 2, 3]
        assert answer.read() == b""


def test_a_watch_fails_in_its_stream(faults: Faults) -> None:
    with faults.rule(FailWatch(410, events=1), verb="watch"), closing(connection(faults)) as wire:
        wire.request("GET", WATCH)
        answer = wire.getresponse()
        assert objects(answer, 1) == [1]
        failed = json.loads(answer.read())
    assert (failed["type"], failed["object"]["code"], failed["object"]["reason"]) == ("ERROR", 410, "Expired")


def test_a_watch_freezes_half_open(faults: Faults) -> None:
    with faults.rule(Freeze(events=2), verb="watch"), closing(connection(faults)) as wire:
        wire.request("GET", WATCH)
        answer = wire.getresponse()
        assert objects(answer, 2) == [1, 2]
        wire.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            answer.readline()


def test_everything_freezes_and_goes_on(faults: Faults) -> None:
    with faults.frozen(), closing(connection(faults, 0.3)) as wire:
        wire.request("GET", PODS)
        with pytest.raises(TimeoutError):
            wire.getresponse()
    assert ask(faults, "GET", PODS)[0] == 200


def test_a_connection_is_dropped_before_the_server_hears_of_it(faults: Faults, upstream: Upstream) -> None:
    with faults.rule(Drop()), pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        ask(faults, "POST", PODS, "{}")
    assert upstream.heard == []


def test_an_answer_is_lost_after_the_server_has_acted(faults: Faults, upstream: Upstream) -> None:
    with faults.rule(LoseAnswer()), pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        ask(faults, "POST", PODS, "{}")
    assert [heard[:3] for heard in upstream.heard] == [("POST", PODS, b"{}")]


def test_a_delayed_request_is_answered(faults: Faults) -> None:
    with faults.rule(Delay(0.01)) as rule:
        assert ask(faults, "GET", PODS)[0] == 200
    assert rule.struck == 1


def test_the_proxy_answers_by_itself(faults: Faults, upstream: Upstream) -> None:
    def answer(asked: Asked, body: bytes) -> tuple[int, object]:
        return 201, {"name": asked.name, "body": body.decode()}

    with faults.rule(Respond(answer), path=f"{PODS}/b"):
        assert ask(faults, "POST", f"{PODS}/b", "hello")[:2] == (201, {"name": "b", "body": "hello"})
    assert upstream.heard == []


def test_an_outage_refuses_connections_and_ends(faults: Faults) -> None:
    with faults.outage(), pytest.raises(ConnectionRefusedError):
        ask(faults, "GET", PODS)
    assert ask(faults, "GET", PODS)[0] == 200


@pytest.mark.parametrize("happens", [Faults.cut, lambda faults: faults.outage().__enter__()], ids=["cut", "outage"])
def test_open_watches_are_closed(faults: Faults, happens: Callable[[Faults], object]) -> None:
    with closing(connection(faults)) as wire:
        wire.request("GET", WATCH)
        answer = wire.getresponse()
        assert objects(answer, 5) == [1, 2, 3, 4, 5]
        happens(faults)
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            answer.read()


def test_a_server_that_is_gone_looks_gone() -> None:
    with socket.socket() as nobody:  # its port is given to no other program meanwhile, and refuses
        nobody.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with proxy_to(gone) as faults, pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
            ask(faults, "GET", PODS)


def test_a_client_that_leaves_ends_its_watch_at_the_server(faults: Faults, upstream: Upstream) -> None:
    with closing(connection(faults)) as wire:
        wire.request("GET", WATCH)
        objects(wire.getresponse(), 5)
        assert not upstream.left.is_set()
    assert upstream.left.wait(30)
