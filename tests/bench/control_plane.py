"""A real API server with our operator as a process beside it, and load on both, for the benchmarks of the operator.

Used by bench_operator_*. All of it runs on the machine that measures: the server, its store, the load and the operator
share its cores, so figures are for that and better with cores to spare.
"""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import yaml

from tests.cluster.build import files_path, program_path
from tests.cluster.crds import define
from tests.cluster.kuberay import define_ray
from tests.cluster.processes import Started, started
from tests.cluster.server import Server, control_plane
from tests.control_plane.operators import Operator

__all__ = [
    "NAMESPACE",
    "ROOT",
    "Api",
    "api_of",
    "bench_server",
    "namespace_of",
    "quantile",
    "rss_bytes",
    "run_operator",
    "say",
    "watched",
]

ROOT = Path(__file__).parents[2]
NAMESPACE = "bench"


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def bench_server() -> Iterator[Server]:
    """An API server with our CRDs, KubeRay's, and the namespace NAMESPACE."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-operator-") as name,
        control_plane(program_path("etcd", say), program_path("kube-apiserver", say), Path(name)) as server,
    ):
        manifests = [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "manifests/crd").iterdir())]
        define(server.client, manifests)
        define_ray(server.client, files_path("kuberay-manifests", say))
        namespace_of(server, NAMESPACE)
        yield server


def namespace_of(server: Server, name: str) -> None:
    """Makes a namespace."""
    server.client.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


_IN_A_POD = """
import pathlib, sys
from finetune_operator import __main__
from finetune_operator.cluster import login

login.ACCOUNT_FOLDER = pathlib.Path(sys.argv[1])
sys.exit(__main__.main(sys.argv[2:]))
"""


@contextmanager
def run_operator(server: Server, name: str, *flags: str) -> Iterator[Operator]:
    """Our operator as it runs in a pod, with its default settings but for the ports; not waited for."""
    account = server.folder / "account"
    account.mkdir(exist_ok=True)
    (account / "token").write_text(server.token, encoding="ascii")
    (account / "ca.crt").write_bytes(server.ca_file.read_bytes())
    where = urlsplit(server.url)
    pod = {
        "KUBECONFIG": "",
        "KUBERNETES_SERVICE_HOST": str(where.hostname),
        "KUBERNETES_SERVICE_PORT": str(where.port),
    }
    command = [
        *(sys.executable, "-c", _IN_A_POD, str(account), f"--pod-name={name}", f"--operator-namespace={NAMESPACE}"),
        *("--metrics-host=127.0.0.1", "--metrics-port=0", *flags),
    ]
    with started(command, server.folder / f"{name}-{time.time_ns()}.log", pod) as process:
        yield Operator(process)


def rss_bytes(process: Started) -> int:
    """Resident memory of a process."""
    resident: int = psutil.Process(process.process.pid).memory_info().rss
    return resident


def quantile(values: Iterable[float], part: float) -> float:
    """The smallest of the values that at least `part` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


class Api:
    """Many requests at once, as an administrator."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def send(self, method: str, path: str, body: Any = None, merge: bool = False) -> Any:
        """The answer. Raises RuntimeError for one of 400 and above."""
        kind = "application/merge-patch+json" if merge else "application/json"
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, path, data=data, headers={"Content-Type": kind}) as answer:
            told = await answer.read()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {told[:300]!r}")
            return json.loads(told)

    async def each(self, method: str, wanted: Iterable[tuple[str, Any]], at_once: int, merge: bool = False) -> None:
        """A request for each pair of path and body, `at_once` of them at a time."""
        waiting = iter(wanted)

        async def work() -> None:
            for path, body in waiting:
                await self.send(method, path, body, merge)

        await asyncio.gather(*(work() for _ in range(at_once)))

    async def at_rate(self, wanted: Iterable[tuple[str, str, Any]], per_second: float) -> dict[str, float]:
        """A POST for each triple of name, path and body, `per_second` offered whatever the answers take.

        When each was answered, in seconds of the monotonic clock.
        """
        answered: dict[str, float] = {}

        async def post(name: str, path: str, body: Any) -> None:
            await self.send("POST", path, body)
            answered[name] = time.monotonic()

        begin = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number, (name, path, body) in enumerate(wanted):
                await asyncio.sleep(max(0.0, begin + number / per_second - time.monotonic()))
                tasks.create_task(post(name, path, body))
        return answered

    async def appearances(self, path: str, seen: dict[str, float]) -> None:
        """Notes in `seen` when each object below `path` was first seen, by name. Goes on until it is cancelled."""
        listed = await self.send("GET", f"{path}?limit=1")
        version = listed["metadata"]["resourceVersion"]
        url = f"{path}?watch=true&resourceVersion={version}"
        async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            buffer = b""
            async for chunk in answer.content.iter_any():
                now = time.monotonic()
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["type"] == "ADDED":
                        seen.setdefault(event["object"]["metadata"]["name"], now)


@asynccontextmanager
async def api_of(server: Server) -> AsyncIterator[Api]:
    """A session with the server."""
    tls = ssl.create_default_context(cafile=str(server.ca_file))
    headers = {"Authorization": f"Bearer {server.token}", "Accept": "application/json"}
    connector = aiohttp.TCPConnector(ssl=tls, limit=64)
    async with aiohttp.ClientSession(server.url, headers=headers, connector=connector, read_bufsize=1 << 20) as session:
        yield Api(session)


@asynccontextmanager
async def watched(api: Api, path: str) -> AsyncIterator[dict[str, float]]:
    """What appears below `path` within the block, and when."""
    seen: dict[str, float] = {}
    task = asyncio.create_task(api.appearances(path, seen))
    await asyncio.sleep(0.5)
    try:
        yield seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
