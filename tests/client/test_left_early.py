"""A watch or a log that is left early has let go of its connection by then, and not when the collector comes by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest

from finetune_client.backends import pod_logs, pod_tail
from finetune_client.backends.kubernetes import KubernetesBackend
from finetune_client.history import moments
from finetune_client.views import LogChoice
from finetune_operator.kinds import Key
from tests.factories import job_document

KEY = Key("team-a", "tiny")
ATTEMPT = {"number": 1, "rayJob": "tiny-1", "createdAt": "2026-01-01T12:00:00Z"}
JOB = job_document(name="tiny") | {"status": {"attempts": [ATTEMPT]}}
JOB["metadata"] |= {"namespace": "team-a", "resourceVersion": "1", "generation": 1}


def pod(name: str) -> dict[str, Any]:
    labels = {"finetune-operator.io/role": "worker"}
    return {"metadata": {"name": name, "labels": labels}, "status": {"phase": "Running"}}


class Connection:
    """A connection to a server that goes on telling; knows how many of its answers are open."""

    host = "https://host"

    def __init__(self, *pods: str) -> None:
        self.num_open = 0
        self.pods = pods or ("tiny-1-worker",)
        self.rank_0 = self.pods[0]
        self.seconds = 0

    async def send(self, method: str, path: str, **how: Any) -> Any:
        return {"items": [pod(name) for name in self.pods]} if path.endswith("/pods") else JOB

    async def lines(self, path: str, query: Any, silence: float | None = None) -> AsyncGenerator[Any]:
        with self._answer():
            while True:
                await asyncio.sleep(0)
                yield {"type": "MODIFIED", "object": JOB}

    async def output(self, path: str, query: Any) -> AsyncGenerator[tuple[int, bytes]]:
        rank = int(f"/{self.rank_0}/" not in path)
        asked_for_the_last = "grep" in str(query)
        with self._answer():
            while rank == 0 or not asked_for_the_last:
                await asyncio.sleep(0)
                self.seconds += 1 - rank
                yield 1, f"{self._now()} worker {rank} INFO a line\n".encode()
                if asked_for_the_last:
                    return

    def _now(self) -> str:
        return f"{datetime(2026, 1, 31) + timedelta(seconds=self.seconds):%Y-%m-%d %H:%M:%S},000"

    @contextmanager
    def _answer(self) -> Iterator[None]:
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


@pytest.mark.parametrize(
    "told",
    [
        lambda backend: backend.watch(KEY),
        lambda backend: backend.logs(KEY, LogChoice(), False),
        lambda backend: backend.logs(KEY, LogChoice(), True),
        lambda backend: backend.logs(KEY, LogChoice(everyone=True), True),
    ],
    ids=["a watch", "a log", "a log, followed", "all logs, followed"],
)
def test_what_is_left_early_is_closed(told: Any) -> None:
    async def main() -> None:
        connection: Any = Connection()
        seen = told(KubernetesBackend(connection, "team-a", AsyncExitStack()))
        for _ in range(3):
            await anext(seen)
        assert connection.num_open == 1
        await seen.aclose()
        assert connection.num_open == 0

    asyncio.run(main())


def test_a_log_is_followed_into_the_pod_that_rank_0_has_moved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((pod_logs, "_MOVED_SECONDS"), (pod_logs, "LOOK_SECONDS"), (pod_tail, "LOOK_SECONDS")):
        monkeypatch.setattr(module, name, 0.01)

    async def main() -> None:
        connection: Any = Connection("tiny-1-worker-a", "tiny-1-worker-b")
        seen = KubernetesBackend(connection, "team-a", AsyncExitStack()).logs(KEY, LogChoice(), True)
        first = [await anext(seen) for _ in range(3)]
        connection.rank_0 = "tiny-1-worker-b"
        sources, texts = [line.source for line in first], [line.text for line in first]
        while sources[-1] != "tiny-1-worker-b":
            line = await anext(seen)
            sources.append(line.source)
            texts.append(line.text)
        assert set(sources[:-1]) == {"tiny-1-worker-a"}
        assert " worker 0 " in texts[-1]
        assert texts[-1] > max(texts[:3]), "nothing is told twice"
        await seen.aclose()
        assert connection.num_open == 0

    asyncio.run(main())


def test_following_a_job_that_is_left_early_closes_both_the_watch_and_the_log() -> None:
    async def main() -> None:
        connection: Any = Connection()
        seen = moments(KubernetesBackend(connection, "team-a", AsyncExitStack()), KEY)
        while connection.num_open < 2:
            await anext(seen)
        await seen.aclose()
        assert connection.num_open == 0

    asyncio.run(main())
