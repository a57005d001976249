"""A whole operator over a cluster in memory, in virtual time, for tests: hours pass at once, and nothing is left out.

    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await asyncio.sleep(1)
        stage.kuberay("example-1", "Running", "RUNNING")
        ...
    play(scenario)

What is not in memory is KubeRay and the trainers: the test says what they do. `stage.cluster` notes every request of
the operator and can be told to refuse one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import progress
from finetune_operator.cluster.protocol import Document
from finetune_operator.handlers import Operator
from finetune_operator.kinds import CONFIG_MAP, EVENT, FINETUNE_JOB, FINETUNE_RUNTIME, RAY_JOB, Key, Kind
from finetune_operator.local import LocalCluster
from finetune_operator.metrics import Metrics
from finetune_operator.runtime.reflector import ListWatch
from finetune_operator.settings import Settings
from tests.operator.runtime.virtual_time import run

__all__ = ["NAMESPACE", "Asked", "Stage", "Watched", "play"]

NAMESPACE = "default"
BEGIN = datetime(2030, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Asked:
    """One request of the operator."""

    verb: str
    kind: Kind
    name: str


class Watched:
    """A `Cluster` that passes requests on, notes them, and refuses those that it is told to."""

    def __init__(self, inner: LocalCluster) -> None:
        self.inner = inner
        self.asked: list[Asked] = []
        self.before: Callable[[Asked], None] = lambda _: None
        """Called for each request; may raise instead of it."""

    def writes(self) -> list[Asked]:
        """Requests that would change something."""
        return [one for one in self.asked if one.verb != "get"]

    async def get(self, kind: Kind, key: Key) -> Document | None:
        self._note("get", kind, key.name)
        return await self.inner.get(kind, key)

    async def create(self, kind: Kind, document: Document) -> Document:
        self._note("create", kind, document["metadata"]["name"])
        return await self.inner.create(kind, document)

    async def apply(self, kind: Kind, document: Document) -> Document:
        self._note("apply", kind, document["metadata"]["name"])
        return await self.inner.apply(kind, document)

    async def merge(self, kind: Kind, key: Key, patch: Document) -> Document:
        self._note("merge", kind, key.name)
        return await self.inner.merge(kind, key, patch)

    async def replace_status(self, kind: Kind, document: Document) -> Document:
        self._note("status", kind, document["metadata"]["name"])
        return await self.inner.replace_status(kind, document)

    async def delete(self, kind: Kind, key: Key, uid: str | None, propagation: str = "Background") -> None:
        self._note("delete", kind, key.name)
        await self.inner.delete(kind, key, uid, propagation)

    def source(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> ListWatch:
        return self.inner.source(kind, namespace, label_selector)

    def _note(self, verb: str, kind: Kind, name: str) -> None:
        asked = Asked(verb, kind, name)
        self.asked.append(asked)
        self.before(asked)


class Stage:
    """The cluster, the operator, and what others do."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.there = LocalCluster(clock=now)
        self.cluster = Watched(self.there)
        self.settings = settings or Settings(pod_name="operator-0")
        self.metrics = Metrics()

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Operator]:
        """An operator that works for the length of the block; what it had in memory is lost afterwards."""
        metrics = Metrics()
        operator = Operator(self.cluster, self.settings, metrics, now)
        tasks = [asyncio.create_task(operator.watch()), asyncio.create_task(operator.work())]
        self.metrics = metrics
        try:
            yield operator
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def submit(self, document: Document) -> Document:
        """As kubectl does."""
        kind = FINETUNE_JOB if document["kind"] == "FineTuneJob" else FINETUNE_RUNTIME
        if kind.namespaced:
            document["metadata"].setdefault("namespace", NAMESPACE)
        return await self.there.create(kind, document)

    async def change(self, name: str, spec: Document) -> None:
        """Merges into the job's spec."""
        await self.there.merge(FINETUNE_JOB, Key(NAMESPACE, name), {"spec": spec})

    async def kuberay(self, name: str, deployment: str, job: str = "", message: str = "", **others: str) -> None:
        """Writes a RayJob's status as KubeRay would."""
        document = self.there.peek(RAY_JOB, Key(NAMESPACE, name))
        assert document is not None, f"there is no RayJob {name}"
        status = {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message, **others}
        await self.there.replace_status(RAY_JOB, {**document, "status": status})

    async def report(self, name: str, attempt: int, step: int, result: progress.Result | None = None) -> None:
        """Writes the progress ConfigMap as the trainers would."""
        stage = progress.Stage.DONE if result else progress.Stage.TRAINING
        latest = progress.Progress(stage=stage, step=step, total_steps=100, updated_at=now())
        data = {"attempt": str(attempt), "progress.json": latest.model_dump_json(by_alias=True)}
        if result is not None:
            model = progress.Artifact(uri=f"s3://models/{name}", kind="model", digest="b3:0", bytes=1)
            outcome = progress.Outcome(result=result, step=step, total_steps=100, artifacts=[model])
            data["outcome.json"] = outcome.model_dump_json(by_alias=True)
        await self.there.merge(CONFIG_MAP, Key(NAMESPACE, f"{name}-progress"), {"data": data})

    def job(self, name: str = "example") -> Document:
        """The job as stored."""
        document = self.there.peek(FINETUNE_JOB, Key(NAMESPACE, name))
        assert document is not None, f"there is no job {name}"
        return document

    def status(self, name: str = "example") -> Document:
        """Its status; empty before the first."""
        status: Document = self.job(name).get("status") or {}
        return status

    def condition(self, type: str, name: str = "example") -> Document:
        """One of its conditions; empty where it is not listed."""
        listed = self.status(name).get("conditions") or []
        return next((one for one in listed if one["type"] == type), {})

    def names(self, kind: Kind) -> list[str]:
        """What there is of a kind."""
        return [document["metadata"]["name"] for document in self.there.select(kind, NAMESPACE)]

    def reasons(self) -> list[str]:
        """Reasons of the Events so far."""
        return [event["reason"] for event in self.there.select(EVENT, NAMESPACE)]

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of a metric of the operator that works, or worked last."""
        return self.metrics.registry.get_sample_value(name, labels)


def now() -> datetime:
    """The time of day on stage."""
    return BEGIN + timedelta(seconds=asyncio.get_running_loop().time())


def play(scenario: Callable[[Stage], Awaitable[None]], **settings: Any) -> None:
    """Plays a scenario with an operator at work."""

    async def main() -> None:
        stage = Stage(Settings(pod_name="operator-0", **settings))
        async with stage.operator():
            await scenario(stage)

    run(main())
