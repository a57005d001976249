"""Pods that share nothing but a bucket: what a job saves and its model are there, and it may be away for a while.

The server is a real one of S3's protocol. It runs on this machine, beside the nodes, where pods reach it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.build import program_path
from tests.cluster.nodes.layout import HOST_ADDRESS
from tests.cluster.s3 import S3, s3_server
from tests.cluster_e2e.conftest import Say, Submit
from tests.cluster_e2e.world import SMALL, World

pytestmark = pytest.mark.cluster

RUNTIME = "bucket"
EVERY = 100
STEPS = 1500
WORKERS = {
    "runtimeRef": {"name": RUNTIME},
    "cluster": {"workers": {"replicas": 2}},
    "scheduling": {"topology": {"mode": "spread", "key": "kubernetes.io/hostname"}},
}


@dataclass(frozen=True)
class Bucket:
    """A bucket, and its server, which can stand still as one does that is overloaded or cut off."""

    name: str
    server: S3

    @property
    def folder(self) -> Path:
        """What it holds, as files."""
        return self.server.folder / self.name

    def freeze(self) -> None:
        """Connections are taken, and nobody answers."""
        self.server.process.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.server.process.process.send_signal(signal.SIGCONT)


def runtime(name: str, bucket: str, secret: str) -> dict[str, Any]:
    """One that stores in a bucket."""
    spec = {**SMALL, "storage": f"s3://{bucket}/runs", "storageSecret": secret}
    return {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneRuntime",
        "metadata": {"name": name},
        "spec": spec,
    }


@pytest.fixture(scope="module")
def bucket(team: World, say: Say, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """With a runtime that stores there, and its keys in a Secret of the team's."""
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(program_path("versitygw", say), folder, HOST_ADDRESS) as server:
        name = server.bucket()
        keys = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket-keys"}}
        team.apply({**keys, "stringData": server.environment()}, runtime(RUNTIME, name, "bucket-keys"))
        yield Bucket(name, server)


def test_checkpoints_and_the_model_of_a_job_are_in_its_bucket(
    team: World, tiny: dict[str, Any], submit: Submit, bucket: Bucket
) -> None:
    job = submit("in-bucket", {**tiny, **WORKERS, "deepspeed": {"zeroStage": 2}, "checkpoint": {"everySteps": 20}})
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
    status = team.status(job)
    assert status["checkpoint"]["step"] == 40
    assert status["checkpoint"]["worldSize"] == 2
    (artifact,) = status["artifacts"]
    prefix = f"s3://{bucket.name}/"
    assert artifact["uri"].startswith(prefix)
    model = bucket.folder / artifact["uri"].removeprefix(prefix)
    assert (model / "adapter_model.safetensors").stat().st_size > 0
    assert "adapter_model.safetensors" in (model / "digests.json").read_text(encoding="utf-8")
    manifests = sorted((bucket.folder / "runs" / team.namespace / job / "checkpoints").rglob("MANIFEST.json"))
    assert [file.parent.name for file in manifests] == ["0000000020-e00001", "0000000040-e00001"]


def test_training_goes_on_while_the_bucket_does_not_answer_and_saves_when_it_does(
    team: World, tiny: dict[str, Any], submit: Submit, bucket: Bucket
) -> None:
    training = {**tiny["training"], "maxSteps": STEPS}
    job = submit("away", {**tiny, **WORKERS, "training": training, "checkpoint": {"everySteps": EVERY}})
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    bucket.freeze()
    try:
        seen = team.step(job)
        team.wait(job, lambda: team.step(job) >= seen + 3 * EVERY, "training to go on without the bucket")
    finally:
        bucket.thaw()
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
    status = team.status(job)
    assert status["progress"]["step"] == STEPS
    assert status["checkpoint"]["step"] == STEPS
    assert len(status["attempts"]) == 1


def test_a_secret_that_does_not_exist_is_named_in_the_status(
    team: World, tiny: dict[str, Any], submit: Submit, bucket: Bucket
) -> None:
    team.apply(runtime("keyless", bucket.name, "no-such-secret"))
    job = submit("keyless", {**tiny, "runtimeRef": {"name": "keyless"}})
    team.wait(job, lambda: "no-such-secret" in team.waits_for(job), "the secret to be named", seconds=60)
    assert "no-such-secret" in team.finetune("describe", job).stdout
