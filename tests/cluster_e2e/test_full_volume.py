"""Room for files runs out under a job, for real: it is told, and nothing that was saved is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import SMALL, World

pytestmark = pytest.mark.cluster

EVERY = 100
STEPS = 1500
ROOM = 48 << 20
"""Bytes: some twenty checkpoints of the tiny model."""


def fill(file: Path) -> None:
    """Writes until nothing more fits beside it."""
    with file.open("wb", buffering=0) as opened, suppress(OSError):
        while opened.write(b"x" * 4096):
            pass


@pytest.fixture
def small_volume(team: World) -> Iterator[Path]:
    """A claim of a file system of its own, and a runtime that stores there."""
    folder = team.folder.with_name("small")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM},mode=777", "tmpfs", str(folder)], check=True)
    size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
    volume = {"capacity": size, "accessModes": modes, "storageClassName": "", "hostPath": {"path": str(folder)}}
    claim = {"resources": {"requests": size}, "accessModes": modes, "storageClassName": "", "volumeName": "small"}
    runtime = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneRuntime", "metadata": {"name": "small"}}
    try:
        team.apply(
            {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "small"}, "spec": volume},
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "small"}, "spec": claim},
            {**runtime, "spec": {**SMALL, "storage": "pvc://small/runs"}},
        )
        yield folder
        team.kubectl("delete", "finetuneruntime/small", "pvc/small", "pv/small")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_job_on_a_full_volume_says_so_and_goes_on_when_there_is_room_again(
    team: World, tiny: dict[str, Any], small_volume: Path, submit: Submit
) -> None:
    spec = {**tiny, "training": {**tiny["training"], "maxSteps": STEPS}, "checkpoint": {"everySteps": EVERY}}
    policy = {"backoff": {"initialSeconds": 1, "maxSeconds": 5}}
    job = submit("crowded", {**spec, "failurePolicy": policy, "runtimeRef": {"name": "small"}})
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    filler = small_volume / "somebody-elses"
    fill(filler)
    team.wait(job, lambda: "space" in team.tell(job), "it to be told that there is no space left")
    filler.unlink()
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
    status = team.status(job)
    assert status["checkpoint"]["step"] == STEPS
    assert status["attempts"][0]["outcome"] == "StorageError"
    assert status["attempts"][-1]["resumedFromStep"] >= EVERY
