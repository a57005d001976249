"""Jobs on a real Ray cluster by its Jobs API: the real driver, the real trainers, a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from finetune_api.job import Phase
from finetune_api.problems import InvalidManifest
from finetune_client import Client
from finetune_client.errors import NoLog, NoSuchJob, Unreachable
from tests.client.ray_head import RayHead, ray_head
from tests.cluster.processes import wait_until
from tests.factories import job_document
from tests.trainers.factories import tiny_model, write_rows

pytestmark = pytest.mark.ray

STEPS = 100_000
"""More than can be made before the job is stopped."""
SLOW = 400.0
"""Seconds that a loaded machine may take to import what trains, for driver, launcher and worker in turn."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray-jobs")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 60)
    return folder


@pytest.fixture(scope="module")
def head(world: Path) -> Iterator[RayHead]:
    with ray_head(world) as one:
        yield one


@pytest.fixture
def client(head: RayHead) -> Iterator[Client]:
    with Client(ray=head.url) as one:
        yield one


def document(world: Path, name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A job on the tiny model, as a person would write it."""
    small = {
        "model.source": f"file://{world}/model",
        "data": {"train": [{"source": f"file://{world}/rows.jsonl"}]},
        "method.sft.maxSeqLength": 64,
        "training": {"maxSteps": 3, "globalBatchSize": 4, "learningRate": 0.001, "precision": "fp32"},
    }
    return job_document(small | (changes or {}), name)


def trainers() -> list[int]:
    """Processes that train, by pid."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if "finetune_trainers run" in line or "RayTrainWorker" in line:
                found.append(process.pid)
        except psutil.Error:
            continue  # gone in between
    return found


def test_a_job_runs_to_its_end_and_tells_of_it_all(head: RayHead, client: Client, world: Path) -> None:
    job = client.submit(document(world, "short"))
    phases = list(dict.fromkeys(status.phase for status in job.watch()))
    assert phases[-1] is Phase.SUCCEEDED, [job.view().status, head.process.last_lines()]
    status = job.status()
    assert [(one.number, one.outcome, one.step) for one in status.attempts] == [(1, "Succeeded", 3)]
    assert status.progress is not None
    assert (status.progress.step, status.progress.total_steps) == (3, 3)
    [artifact] = job.artifacts()
    folder = Path(urlsplit(artifact.uri).path)
    assert (folder / "adapter_model.safetensors").exists()
    lines = [line.text for line in job.logs(follow=True)]
    assert any("Loading weights" in line for line in lines)
    assert not any(line.startswith("::finetune") for line in lines)
    assert "short" in [view.name for view in client.list()]
    with pytest.raises(InvalidManifest, match=r"metadata\.name: is the name of a job that is there already"):
        client.submit(document(world, "short"))
    with pytest.raises(NoLog, match="attempts with a log: 1"):
        list(job.logs(attempt=2))
    job.cancel()
    assert "short" not in [view.name for view in client.list()]


def test_a_job_is_suspended_goes_on_and_is_cancelled(client: Client, world: Path) -> None:
    training = {"training.maxSteps": STEPS, "checkpoint": {"everySteps": 1000}}
    job = client.submit(document(world, "long", training))
    wait_until(lambda: job.status().phase is Phase.RUNNING, "the job to run", seconds=SLOW)
    job.suspend()
    status = job.wait()
    assert status.phase is Phase.SUSPENDED
    assert status.checkpoint is not None
    wait_until(lambda: trainers() == [], "the trainers to end")  # the driver has; Ray ends workers of its own accord
    job.resume()
    wait_until(lambda: [one.number for one in job.status().attempts] == [1, 2], "the second attempt", seconds=SLOW)
    wait_until(lambda: job.status().phase is Phase.RUNNING, "the second attempt to run", seconds=SLOW)
    resumed = job.status().attempts[-1].resumed_from_step
    assert resumed is not None
    assert resumed >= status.checkpoint.step
    job.cancel()
    with pytest.raises(NoSuchJob, match="there is no job long in namespace default"):
        job.status()
    wait_until(lambda: trainers() == [], "the trainers to end")


def test_a_mistake_is_found_before_anything_is_submitted(client: Client, world: Path) -> None:
    with pytest.raises(InvalidManifest, match="globalBatchSize"):
        client.submit(document(world, "wrong", {"training.globalBatchSize": 1, "cluster.workers.replicas": 2}))
    with pytest.raises(InvalidManifest, match=r"spec\.runtimeRef\.name: is not the name of a FineTuneRuntime"):
        client.submit(document(world, "wrong", {"runtimeRef": {"name": "pool"}}))
    assert "wrong" not in [view.name for view in client.list()]


def test_an_address_that_is_no_dashboard_is_named() -> None:
    with (
        Client(ray="http://127.0.0.1:9") as client,
        pytest.raises(Unreachable, match=r"http://127.0.0.1:9 does not answer: .*the address of a Ray dashboard"),
    ):
        client.list()
    with Client(ray="127.0.0.1:8265") as client, pytest.raises(Unreachable, match="such as http://HEAD:8265"):
        client.list()
