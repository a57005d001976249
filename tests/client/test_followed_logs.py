"""Logs of pods as they grow: connections are cut, files come late, attempts end. A real shell reads real files."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from finetune_client.backends import patience, pod_logs, pod_tail
from finetune_client.backends.kubernetes import KubernetesBackend
from finetune_client.cli.exits import ABSENT
from finetune_client.errors import NoLog, NotAllowed, Refused
from finetune_client.views import LogChoice
from finetune_operator.kinds import Key
from tests.client.conftest import Finetune
from tests.factories import job_document

KEY = Key("team-a", "tiny")
NOW = "2026-01-01T12:00:00Z"
SHARED, OWN = "/mnt/pvc/runs/jobs/team-a/tiny/attempt-1", "/var/finetune/run"


class World:
    """An API server with one job whose first attempt has a head and two workers, each with a folder on this disk."""

    def __init__(self, folder: Path, workdir: str) -> None:
        self.folder, self.workdir = folder, workdir
        self.pods = ["tiny-1-head", "tiny-1-worker-a", "tiny-1-worker-b"]
        self.attempt: dict[str, Any] = {"number": 1, "rayJob": "tiny-1", "createdAt": NOW}
        self.status: dict[str, Any] = {"phase": "Running", "observedGeneration": 1}
        self.forbidden = False
        self.num_asked = 0
        self.num_begun = 0
        self._sockets: list[web.Request] = []

    def write(self, pod: str, *lines: str) -> None:
        file = self._folder_of(pod) / "trainer.log"
        file.parent.mkdir(exist_ok=True)
        with file.open("a") as log:
            log.writelines(f"{line}\n" for line in lines)

    def end_attempt(self) -> None:
        self.attempt["endedAt"] = NOW

    def cut(self) -> None:
        """All connections to pods, without a word."""
        for request in self._sockets:
            if request.transport is not None:
                request.transport.abort()

    def _folder_of(self, pod: str) -> Path:
        return self.folder / ("shared" if self.workdir == SHARED else pod)

    @asynccontextmanager
    async def backend(self) -> AsyncIterator[KubernetesBackend]:
        app = web.Application()
        pods = "/api/v1/namespaces/team-a/pods"
        app.router.add_get("/apis/finetune-operator.io/v1alpha1/namespaces/team-a/finetunejobs/tiny", self._job)
        app.router.add_get(pods, self._pods)
        app.router.add_get(f"{pods}/{{pod}}/exec", self._exec)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        kubeconfig = self.folder / "kubeconfig"
        server = {"server": f"http://127.0.0.1:{runner.addresses[0][1]}"}
        config = {
            "clusters": [{"name": "c", "cluster": server}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        kubeconfig.write_text(yaml.safe_dump(config))
        backend = await KubernetesBackend.open("team-a", None, kubeconfig)
        try:
            yield backend
        finally:
            await backend.close()
            await runner.cleanup()

    async def _job(self, _: web.Request) -> web.Response:
        self.num_asked += 1
        document = job_document(name="tiny")
        document["metadata"] |= {"namespace": "team-a", "resourceVersion": "1", "generation": 1}
        return web.json_response(
            document | {"status": self.status | {"attempts": [self.attempt] if self.attempt else []}}
        )

    async def _pods(self, _: web.Request) -> web.Response:
        variables = [{"name": "FINETUNE_WORKDIR", "value": self.workdir}]
        found = [
            {
                "metadata": {"name": pod, "labels": {"finetune-operator.io/role": pod.split("-")[2]}},
                "spec": {"containers": [{"name": "ray", "env": variables}]},
                "status": {"phase": "Running"},
            }
            for pod in self.pods
        ]
        return web.json_response({"items": found})

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        """What a kubelet does: a process in the container, its streams over the socket, and at last its exit code."""
        if self.forbidden:
            return web.json_response({"kind": "Status", "reason": "Forbidden", "code": 403}, status=403)
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        self._sockets.append(request)
        self.num_begun += 1
        process = await asyncio.create_subprocess_exec(
            *request.query.getall("command"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"FINETUNE_WORKDIR": str(self._folder_of(request.match_info["pod"]))},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        listening = asyncio.create_task(socket.receive())  # answers pings, and learns of the end
        try:
            await socket.send_bytes(b"\x01")
            printing = asyncio.create_task(_print(process, socket))
            await asyncio.wait({listening, printing}, return_when=asyncio.FIRST_COMPLETED)
            printing.cancel()
            await asyncio.gather(printing, return_exceptions=True)
        finally:
            listening.cancel()
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
        return socket


async def _print(process: asyncio.subprocess.Process, socket: web.WebSocketResponse) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    while piece := await process.stdout.read(7):  # lines are cut anywhere
        await socket.send_bytes(b"\x01" + piece)
    await socket.send_bytes(b"\x02" + await process.stderr.read())
    code = await process.wait()
    status = {"status": "Success"} if code == 0 else {"status": "Failure", "reason": "NonZeroExitCode", "message": "1"}
    await socket.send_bytes(b"\x03" + json.dumps(status).encode())


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((pod_logs, "LOOK_SECONDS"), (pod_tail, "LOOK_SECONDS"), (pod_logs, "_MOVED_SECONDS")):
        monkeypatch.setattr(module, name, 0.05)


def play(world: World, scenario: Callable[[KubernetesBackend], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), world.backend() as backend:
            await scenario(backend)

    asyncio.run(main())


def line(second: int, who: str = "worker 0", text: str = "INFO a line") -> str:
    return f"2026-01-31 10:15:{second:02},003 {who} {text}"


@pytest.mark.parametrize("everyone", [False, True], ids=["rank 0's", "everyone's"])
@pytest.mark.parametrize("workdir", [SHARED, OWN], ids=["in a shared folder", "in folders of their own"])
def test_a_log_goes_on_after_a_cut_from_where_it_was_and_ends_with_the_attempt_though_its_pods_are_kept(
    tmp_path: Path, workdir: str, everyone: bool
) -> None:
    world = World(tmp_path, workdir)
    world.write("tiny-1-worker-b", line(1), "the same line", "the same line")

    async def scenario(backend: KubernetesBackend) -> None:
        told: list[str] = []
        async with aclosing(backend.logs(KEY, LogChoice(everyone=everyone), True)) as lines:
            async for one in lines:
                told.append(one.text)
                if len(told) == 3:
                    world.cut()
                    world.write("tiny-1-worker-b", "the same line", "étrange")
                if len(told) == 5:
                    world.cut()
                    world.end_attempt()
                    world.write("tiny-1-worker-b", line(2))
        assert told == [line(1), "the same line", "the same line", "the same line", "étrange", line(2)]

    play(world, scenario)


def test_a_log_that_is_quiet_when_the_attempt_ends_is_left_though_nothing_is_cut(tmp_path: Path) -> None:
    world = World(tmp_path, SHARED)
    world.write("tiny-1-head", line(1))

    async def scenario(backend: KubernetesBackend) -> None:
        async for one in backend.logs(KEY, LogChoice(), True):
            assert one.text == line(1)
            world.end_attempt()

    play(world, scenario)
    assert world.num_begun == 2, "what follows, and what was left"


@pytest.mark.parametrize("workdir", [SHARED, OWN], ids=["in a shared folder", "in folders of their own"])
def test_a_log_that_is_not_there_yet_is_told_so_or_waited_for(tmp_path: Path, workdir: str) -> None:
    world = World(tmp_path, workdir)

    async def scenario(backend: KubernetesBackend) -> None:
        with pytest.raises(NoLog, match=r"the trainers in pod tiny-1-\S+ have written no log yet; -f waits for it"):
            [one async for one in backend.logs(KEY, LogChoice(), False)]
        following = asyncio.create_task(anext(backend.logs(KEY, LogChoice(), True)))
        begun = world.num_begun
        while world.num_begun == begun:
            await asyncio.sleep(0.01)
        world.write("tiny-1-worker-a", line(1))
        assert (await following).text == line(1)

    play(world, scenario)


def test_a_log_that_all_pods_share_is_told_once(tmp_path: Path) -> None:
    world = World(tmp_path, SHARED)
    world.write("tiny-1-head", line(1, "launcher"), line(2), line(3, "worker 1"))

    async def scenario(backend: KubernetesBackend) -> None:
        told = [one.text async for one in backend.logs(KEY, LogChoice(everyone=True), False)]
        assert told == [line(1, "launcher"), line(2), line(3, "worker 1")]

    play(world, scenario)


def test_of_everyones_logs_those_of_pods_that_come_later_are_followed_too(tmp_path: Path) -> None:
    world = World(tmp_path, OWN)
    world.pods.remove("tiny-1-worker-b")
    world.write("tiny-1-worker-a", line(1))
    world.write("tiny-1-worker-b", line(2, "worker 1"))

    async def scenario(backend: KubernetesBackend) -> None:
        async with aclosing(backend.logs(KEY, LogChoice(everyone=True), True)) as lines:
            assert (await anext(lines)).source == "tiny-1-worker-a"
            world.pods.append("tiny-1-worker-b")
            assert (await anext(lines)).source == "tiny-1-worker-b"

    play(world, scenario)


def test_the_first_lines_of_rank_0_are_told_when_another_pods_log_was_there_before(tmp_path: Path) -> None:
    world = World(tmp_path, OWN)
    world.write("tiny-1-worker-a", line(5, "worker 1"))

    async def scenario(backend: KubernetesBackend) -> None:
        following = asyncio.create_task(anext(backend.logs(KEY, LogChoice(), True)))
        while world.num_begun < 4:  # it looks for rank 0
            await asyncio.sleep(0.01)
        world.write("tiny-1-worker-b", line(3))
        assert (await following).text == line(3)

    play(world, scenario)


def test_an_attempt_that_ended_without_a_log_is_told_by_what_the_status_kept(tmp_path: Path) -> None:
    world = World(tmp_path, SHARED)
    found = {"attempt": 1, "failureClass": "UserError", "message": "rows.jsonl:17: messages is empty"}

    async def scenario(backend: KubernetesBackend) -> None:
        following = asyncio.create_task(anext(backend.logs(KEY, LogChoice(), True)))
        while not world.num_begun:
            await asyncio.sleep(0.01)
        world.status["postMortem"] = found
        world.end_attempt()
        assert (await following).text == found["message"]
        del world.status["postMortem"]
        with pytest.raises(NoLog, match="tiny-1-head have written no log yet; the attempt has ended"):
            await anext(backend.logs(KEY, LogChoice(), True))

    play(world, scenario)


def test_a_log_that_cannot_be_read_is_an_error_and_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(pod_tail, "_FOLLOW", "echo no such program >&2; exit 127 # {}")
    world = World(tmp_path, SHARED)
    world.write("tiny-1-head", line(1))

    async def scenario(backend: KubernetesBackend) -> None:
        with pytest.raises(Refused, match="the log in pod tiny-1-head cannot be read: no such program"):
            await anext(backend.logs(KEY, LogChoice(), True))
        world.forbidden = True
        for follow in (False, True):
            with pytest.raises(NotAllowed, match="read the log in pod tiny-1-head"):
                await anext(backend.logs(KEY, LogChoice(), follow))

    play(world, scenario)


def test_who_follows_the_log_of_a_job_that_waits_is_told_what_it_waits_for(tmp_path: Path, finetune: Finetune) -> None:
    world = World(tmp_path, SHARED)
    world.attempt = {}
    admitted = {"type": "Admitted", "status": "False", "reason": "Pending", "message": "4 more GPUs are wanted"}
    world.status |= {"phase": "Pending", "conditions": [admitted | {"lastTransitionTime": NOW}]}

    async def scenario(backend: KubernetesBackend) -> None:
        kubeconfig = tmp_path / "kubeconfig"
        command = ("logs", "tiny", "-f", "-n", "team-a", "--kubeconfig", kubeconfig)
        following = asyncio.create_task(asyncio.to_thread(finetune, *command))
        while world.num_asked < 4:
            await asyncio.sleep(0.01)
        world.status["phase"] = "Suspended"
        done = await following
        assert done.code == ABSENT
        assert done.stderr.startswith("Waiting for the log of job tiny, which is Pending: 4 more GPUs are wanted")
        assert "job tiny has not started" in done.stderr

    play(world, scenario)
