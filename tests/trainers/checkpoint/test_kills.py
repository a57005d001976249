"""A process that is killed with SIGKILL at any moment, again and again: what it had published is there, and whole."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import sweep
from tests.cluster.s3 import S3
from tests.trainers.checkpoint.saving import original, restored, start

NUM_KILLS = 200 if os.environ.get("FINETUNE_LONG") else 8
ROOT = Path(__file__).resolve().parents[3]


def run_and_kill(uri: str, lines: int, environment: Mapping[str, str]) -> int:
    """Starts a saver and kills it after so many lines -> the last step that it told to be published, 0 for none."""
    command = [sys.executable, "-m", "tests.trainers.checkpoint.saver", uri]
    published = 0
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | dict(environment), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for count, line in enumerate(process.stdout):
            if line.startswith("published"):
                published = int(line.split()[1])
            if count >= lines:
                process.kill()
                break
        # What it said before it died is still in the pipe.
        published = max([published, *(int(line.split()[1]) for line in process.stdout if line.startswith("published"))])
        assert process.wait() == -9
    return published


def kill_again_and_again(uri: str, storage: Storage, environment: Mapping[str, str]) -> None:
    rng, last = random.Random(11), 0
    search = find_newest(storage, deep=True)
    for _ in range(NUM_KILLS):
        last = max(last, run_and_kill(uri, rng.randrange(400), environment))
        search = find_newest(storage, deep=True)
        assert search.rejected == ()
        assert (search.manifest.id.step if search.manifest else 0) >= last
    newest = find_newest(storage).manifest
    assert newest is not None
    assert restored(storage, newest) == original(newest.intent)
    fence = start(storage)
    sweep(storage, Retention(keep_last=1), fence)
    assert len(listed(storage)) == 1, "nothing half written is left"


def test_a_process_that_is_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/run"
    kill_again_and_again(uri, open_storage(uri), {})


@pytest.mark.control_plane
def test_nor_does_it_in_a_bucket(s3: S3) -> None:
    uri = f"s3://{s3.bucket()}/run"
    kill_again_and_again(uri, open_storage(uri, options=s3.options()), s3.environment())
