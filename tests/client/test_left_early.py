"""A watch or a log that is left early has let go of its connection by then, and not when the collector comes by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import pytest

from finetune_client.backends.kubernetes import KubernetesBackend
from finetune_client.history import moments
from finetune_client.views import LogChoice
from finetune_operator.kinds import Key
from tests.factories import job_document

KEY = Key("team-a", "tiny")
ATTEMPT = {"number": 1, "rayJob": "tiny-1", "createdAt": "2026-01-01T12:00:00Z"}
JOB = job_document(name="tiny") | {"status": {"attempts": [ATTEMPT]}}
JOB["metadata"] |= {"namespace": "team-a", "resourceVersion": "1", "generation": 1}
POD = {
    "metadata": {"name": "tiny-1-worker", "labels": {"finetune-operator.io/role": "worker"}},
    "status": {"phase": "Running"},
}


class Connection:
    """A connection to a server that goes on telling; knows how many of its answers are open."""

    host = "https://host"

    def __init__(self) -> None:
        self.num_open = 0

    async def send(self, method: str, path: str, **how: Any) -> Any:
        return {"items": [POD]} if path.endswith("/pods") else JOB

    async def lines(self, path: str, query: Any) -> AsyncGenerator[Any]:
        with self._answer():
            while True:
                await asyncio.sleep(0)
                yield {"type": "MODIFIED", "object": JOB}

    async def output(self, path: str, query: Any) -> AsyncGenerator[tuple[int, bytes]]:
        with self._answer():
            while True:
                await asyncio.sleep(0)
                yield 1, b"a line\n"

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
        lambda backend: backend.logs(KEY, LogChoice(everyone=True), True),
    ],
    ids=["a watch", "a log", "all logs, followed"],
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


def test_following_a_job_that_is_left_early_closes_both_the_watch_and_the_log() -> None:
    async def main() -> None:
        connection: Any = Connection()
        seen = moments(KubernetesBackend(connection, "team-a", AsyncExitStack()), KEY)
        while connection.num_open < 2:
            await anext(seen)
        await seen.aclose()
        assert connection.num_open == 0

    asyncio.run(main())
