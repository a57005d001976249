"""A Ray job's log as it grows: what is asked of a dashboard, whose connections are cut. The dashboard is a stand-in."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import WSCloseCode, web

from finetune_client.backends import ray_jobs
from finetune_client.backends.ray_jobs import RayJobsBackend
from finetune_client.output import ATTEMPT_MARK, JOB_MARK
from finetune_client.views import LogChoice
from finetune_operator.kinds import Key

KEY = Key("default", "tiny")
ID = "finetune-default-tiny-1"


class Dashboard:
    """One Ray job of ours, its output, and how often that was asked for."""

    def __init__(self) -> None:
        self.output = f"{JOB_MARK}{{}}\n{ATTEMPT_MARK}1\n"
        self.status = "RUNNING"
        self.asked = Counter[str]()
        self._cut = asyncio.Event()

    def print(self, *lines: str) -> None:
        self.output += "".join(f"{line}\n" for line in lines)

    def cut(self) -> None:
        """All connections."""
        self._cut.set()
        self._cut = asyncio.Event()

    def play(self, scenario: Callable[[RayJobsBackend], Awaitable[None]]) -> None:
        async def main() -> None:
            app = web.Application()
            app.router.add_get("/api/jobs/", self._all)
            app.router.add_get(f"/api/jobs/{ID}", self._one)
            app.router.add_get(f"/api/jobs/{ID}/logs", self._logs)
            app.router.add_get(f"/api/jobs/{ID}/logs/tail", self._tail)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            try:
                async with asyncio.timeout(60):
                    await scenario(RayJobsBackend(f"http://127.0.0.1:{runner.addresses[0][1]}"))
            finally:
                await runner.cleanup()

        asyncio.run(main())

    def _document(self) -> dict[str, object]:
        names = {"job": "tiny", "namespace": "default", "folder": "~/runs", "turn": "1"}
        metadata = {f"finetune-operator.io/{name}": value for name, value in names.items()}
        return {"submission_id": ID, "status": self.status, "metadata": metadata}

    async def _all(self, _: web.Request) -> web.Response:
        return web.json_response([self._document()])

    async def _one(self, _: web.Request) -> web.Response:
        return web.json_response(self._document())

    async def _logs(self, _: web.Request) -> web.Response:
        self.asked["whole"] += 1
        return web.json_response({"logs": self.output})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        self.asked["tail"] += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        cut, place = self._cut, 0
        while not cut.is_set():
            is_over = self.status != "RUNNING"
            while place < len(self.output):  # lines are cut anywhere
                piece = self.output[place : place + 5]
                place += len(piece)
                await socket.send_str(piece)
            if is_over:
                break
            await asyncio.sleep(0.01)
        await socket.close(code=WSCloseCode.OK)  # of the dashboard; that it has lost the node is not told
        return socket


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "LOOK_SECONDS", 0.01)


def test_a_log_is_followed_over_cut_connections_and_its_whole_is_asked_for_at_both_ends_only() -> None:
    dashboard = Dashboard()
    dashboard.print("first", "again", "again")

    async def scenario(backend: RayJobsBackend) -> None:
        told: list[str] = []
        async for line in backend.logs(KEY, LogChoice(), True):
            told.append(line.text)
            if len(told) == 3:
                dashboard.cut()
                dashboard.print("again", f"{JOB_MARK}{{}}", "étrange")
            if len(told) == 5:
                dashboard.status = "SUCCEEDED"
                dashboard.cut()
                dashboard.print("last")
        assert told == ["first", "again", "again", "again", "étrange", "last"]

    dashboard.play(scenario)
    assert dashboard.asked["whole"] == 2


def test_following_an_attempt_ends_when_another_one_begins() -> None:
    dashboard = Dashboard()
    dashboard.print("first")

    async def scenario(backend: RayJobsBackend) -> None:
        told: list[str] = []
        async for line in backend.logs(KEY, LogChoice(), True):
            told.append(line.text)
            dashboard.print(f"{ATTEMPT_MARK}2", "of the second")
        assert told == ["first"]

    dashboard.play(scenario)
