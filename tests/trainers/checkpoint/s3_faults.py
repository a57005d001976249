"""Between a client and an S3 server: passes requests on, and at chosen ones misbehaves as networks and stores do.

The Host header stays as the client wrote it, since its signature is over it.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

__all__ = ["Fault", "FaultyEndpoint", "faulty_endpoint"]

Fault = Literal["refuse", "reset", "lose", "freeze", "unconditional"]
"""503 in the server's place; closed before the server hears of it; carried out, and closed before the answer; carried
out, and never answered; 501 in the server's place to what has a condition."""


class FaultyEndpoint:
    """Its address, and the requests that it has seen. `choose`: number of the request, method and path -> fault."""

    def __init__(self, server: str) -> None:
        self.server = server.removeprefix("http://")
        self.url = ""
        self.choose: Callable[[int, str], Fault | None] = lambda number, what: None
        self.seen: list[str] = []
        self.thawed = threading.Event()
        """Ends what is frozen."""
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Count from 0 again, without faults."""
        self.seen = []
        self.choose = lambda number, what: None

    def fault_of(self, what: str) -> Fault | None:
        with self._lock:
            self.seen.append(what)
            return self.choose(len(self.seen) - 1, what)


@contextmanager
def faulty_endpoint(server: str) -> Iterator[FaultyEndpoint]:
    """Listens on loopback for as long as it is needed."""
    endpoint = FaultyEndpoint(server)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(endpoint))
    listener.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.thawed.set()
        listener.shutdown()
        thread.join()
        listener.server_close()


def _handler(endpoint: FaultyEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, BrokenPipeError):
                self.close_connection = True  # the client has left

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = endpoint.fault_of(f"{self.command} {self.path}")
            if fault == "reset":
                self._hang_up()
            elif fault == "refuse":
                self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
            elif fault == "unconditional" and self.headers.get("If-None-Match"):
                self._answer(
                    501, [], b"<Error><Code>NotImplemented</Code><Message>A header is not known</Message></Error>"
                )
            else:
                status, headers, content = self._ask(body)
                if fault == "freeze":
                    endpoint.thawed.wait()
                if fault in (None, "unconditional"):
                    self._answer(status, headers, content)
                else:
                    self._hang_up()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass  # noqa: N815 - names of the standard library's

        def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(endpoint.server, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
            self.send_response_only(status)
            kept = [(name, value) for name, value in headers if name.lower() not in ("connection", "transfer-encoding")]
            if not any(name.lower() == "content-length" for name, _ in kept):
                kept.append(("Content-Length", str(len(content))))
            for name, value in kept:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def _hang_up(self) -> None:
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Nothing is said aloud."""

    return Handler
