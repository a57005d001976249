"""The pages that Prometheus and the kubelet ask for, and callers that are slow or speak something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from finetune_operator.metrics import Metrics
from finetune_operator.runtime.reflector import Reflector
from finetune_operator.server import Server
from tests.operator.runtime.fakes import FakeServer
from tests.operator.runtime.virtual_time import run

HOST = "127.0.0.1"


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Server]:
    async with Server(Metrics(), HOST, 0, **{"ready": {}, **options}) as server:
        yield server


async def ask(server: Server, request: bytes) -> tuple[str, str, str]:
    """Status line, headers and body of the answer."""
    reader, writer = await asyncio.open_connection(HOST, server.port)
    try:
        writer.write(request)
        answer = (await reader.read()).decode()
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    status, _, headers = head.partition("\r\n")
    return status, headers, body


async def get(server: Server, path: str) -> tuple[str, str]:
    status, _, body = await ask(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return status, body


def _breaks() -> str | None:
    raise ValueError("a bug")


def test_metrics_are_shown_in_prometheus_form() -> None:
    async def main() -> None:
        async with serving() as server:
            status, headers, body = await ask(server, b"GET /metrics?x=1 HTTP/1.1\r\n\r\n")
            assert status == "HTTP/1.1 200 OK"
            assert "Content-Type: text/plain; version=0.0.4" in headers
            assert f"Content-Length: {len(body.encode())}" in headers
            assert "# TYPE workqueue_depth gauge" in body

    asyncio.run(main())


def test_without_a_problem_both_health_pages_say_ok() -> None:
    async def main() -> None:
        async with serving(ready={"watches": lambda: None}) as server:
            assert await get(server, "/healthz") == ("HTTP/1.1 200 OK", "ok\n")
            assert await get(server, "/readyz") == ("HTTP/1.1 200 OK", "[+] watches: ok\nok\n")

    asyncio.run(main())


def test_a_replica_that_is_not_ready_says_why_and_stays_alive() -> None:
    async def main() -> None:
        ready = {"fine": lambda: None, "watches": lambda: "RayJob has not been listed yet", "broken": _breaks}
        async with serving(ready=ready, live={"fine": lambda: None}) as server:
            status, body = await get(server, "/readyz")
            assert status == "HTTP/1.1 503 Service Unavailable"
            assert body.splitlines() == [
                "[+] fine: ok",
                "[-] watches: RayJob has not been listed yet",
                "[-] broken: the check itself failed: a bug",
                "failed",
            ]
            assert (await get(server, "/healthz"))[0] == "HTTP/1.1 200 OK"

    asyncio.run(main())


def test_a_watch_that_went_stale_is_seen_from_outside() -> None:
    async def main() -> None:
        source = FakeServer()
        reflector = Reflector(source, "RayJob", on_change=lambda _: None, idle_seconds=70)
        watching = asyncio.create_task(reflector.run())
        async with serving(ready={"rayjobs": reflector.problem}) as server:
            await asyncio.sleep(30)
            assert (await get(server, "/readyz"))[0] == "HTTP/1.1 200 OK"
            source.silent = True
            await asyncio.sleep(300)
            status, body = await get(server, "/readyz")
            assert status == "HTTP/1.1 503 Service Unavailable"
            assert "[-] rayjobs: nothing was heard of RayJob for " in body
            source.silent = False
            await asyncio.sleep(300)
            assert (await get(server, "/readyz"))[0] == "HTTP/1.1 200 OK"
        watching.cancel()
        await asyncio.wait((watching,))

    run(main())


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /secrets HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"GET /metrics\r\n\r\n", "400 Bad Request"),
        (b"\x16\x03\x01 \xff\xfe /\r\n\r\n", "400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 10_000 + b"\r\n\r\n", "431 Request Header Fields Too Large"),
    ],
    ids=["another page", "another method", "no version", "not HTTP", "too long"],
)
def test_other_requests_are_refused(request_bytes: bytes, status: str) -> None:
    async def main() -> None:
        async with serving() as server:
            assert (await ask(server, request_bytes))[0] == f"HTTP/1.1 {status}"

    asyncio.run(main())


def test_head_gives_the_head_alone() -> None:
    async def main() -> None:
        async with serving() as server:
            status, headers, body = await ask(server, b"HEAD /healthz HTTP/1.1\r\n\r\n")
            assert (status, body) == ("HTTP/1.1 200 OK", "")
            assert "Content-Length: 3" in headers

    asyncio.run(main())


def test_a_page_that_cannot_be_made_is_an_error_and_the_server_goes_on() -> None:
    async def main() -> None:
        metrics = Metrics()
        metrics.queue_depth.labels("q", "q").set_function(lambda: 1 / 0)
        async with Server(metrics, HOST, 0, ready={}) as server:
            assert (await get(server, "/metrics"))[0] == "HTTP/1.1 500 Internal Server Error"
            assert (await get(server, "/healthz"))[0] == "HTTP/1.1 200 OK"

    asyncio.run(main())


def test_a_caller_who_says_nothing_is_let_go() -> None:
    async def main() -> None:
        async with serving(request_seconds=10) as server:
            assert await ask(server, b"GET /met") == ("", "", "")
            assert asyncio.get_running_loop().time() >= 10

    run(main())


def test_a_caller_who_hangs_up_and_one_who_stays_leave_nothing_behind() -> None:
    async def main() -> None:
        async with serving() as server:
            _, gone = await asyncio.open_connection(HOST, server.port)
            gone.write(b"GET /met")
            gone.close()
            await gone.wait_closed()
            reader, stays = await asyncio.open_connection(HOST, server.port)
            assert (await get(server, "/healthz"))[0] == "HTTP/1.1 200 OK"
        assert await reader.read() == b""
        stays.close()
        await stays.wait_closed()

    asyncio.run(main())


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    async def main() -> None:
        async with serving() as server:
            with pytest.raises(OSError, match="address already in use"):
                async with Server(Metrics(), HOST, server.port, ready={}):
                    pass

    asyncio.run(main())
