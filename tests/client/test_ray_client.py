"""Jobs on a real Ray cluster by Ray Client: clients come and go, the job does not.

The driver is that of the Jobs API, whose tests follow a job to its artifact and go on with a suspended one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray

from finetune_api.job import Phase
from finetune_api.problems import InvalidManifest
from finetune_client import Client
from finetune_client.backends.ray_client import RayClientDrivers
from finetune_client.errors import NoSuchJob, Unreachable
from finetune_operator.kinds import Key
from tests.client.ray_head import RayHead, ray_head
from tests.client.test_ray_jobs import SLOW, STEPS, document, trainers
from tests.cluster.processes import wait_until
from tests.trainers.factories import tiny_model, write_rows
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.ray, *WHEN_TRAINING]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray-client")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 60)
    return folder


@pytest.fixture(scope="module")
def head(world: Path) -> Iterator[RayHead]:
    with ray_head(world) as one:
        yield one


def test_a_job_outlives_the_client_that_submitted_it_and_another_one_follows_it_on(head: RayHead, world: Path) -> None:
    with Client(ray=head.client_address) as first:
        training = {"training.maxSteps": STEPS, "checkpoint": {"everySteps": 1000}}
        job = first.submit(document(world, "long", training))
        wait_until(lambda: job.status().phase is Phase.RUNNING, "the job to run", seconds=SLOW)
        with pytest.raises(InvalidManifest, match=r"metadata\.name: is the name of a job that is there already"):
            first.submit(document(world, "long"))
        with pytest.raises(FileExistsError):
            asyncio.run(begun_anyway(head.client_address, job.key))
    with Client(ray=head.client_address) as second:
        assert [view.name for view in second.list()] == ["long"]
        job = second.job("long")
        before = job.status().progress
        assert before is not None
        wait_until(lambda: (job.status().progress or before).step > before.step, "another step", seconds=SLOW)
        job.suspend()
        status = job.wait()
        assert status.phase is Phase.SUSPENDED
        assert status.checkpoint is not None
        assert any("Loading weights" in line.text for line in job.logs(attempt=1))
        job.cancel()
        with pytest.raises(NoSuchJob):
            job.status()
        assert second.list() == []
    wait_until(lambda: trainers() == [], "the trainers to end")


async def begun_anyway(address: str, key: Key) -> None:
    """A job is begun by somebody who looked for its name before it was there."""
    drivers = await RayClientDrivers.open(address, None)
    try:
        await drivers.start(key, "")
    finally:
        await drivers.close()


def test_an_address_where_nothing_listens_is_named() -> None:
    with (
        Client(ray="ray://127.0.0.1:9") as client,
        pytest.raises(Unreachable, match=r"ray://127.0.0.1:9 does not answer: .*ray://HEAD:10001"),
    ):
        client.list()


def test_a_server_of_rays_that_dies_as_it_starts_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def init(address: str, **_: Any) -> Any:
        asked.append(address)
        if len(asked) < 3:
            raise ConnectionAbortedError("Initialization failure from server")
        return nullcontext()

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"ray://127.0.0.1:{listening.getsockname()[1]}"
        asyncio.run(RayClientDrivers.open(address, None))
    assert asked == [address] * 3


def test_a_cluster_that_always_refuses_is_asked_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def init(address: str, **_: Any) -> Any:
        asked.append(address)
        raise ConnectionAbortedError("Initialization failure from server")

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"ray://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(Unreachable, match=f"{address} does not answer: Initialization failure from server"):
            asyncio.run(RayClientDrivers.open(address, None))
    assert len(asked) == 5
