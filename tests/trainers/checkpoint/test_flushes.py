"""From staging to a checkpoint, by real writer processes and without torch: what is copied, published, and left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.fence import Fence, take_fence
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.flushes import Flushes
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.manifest import Intent
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.writer_protocol import Begin
from tests.cluster.processes import is_alive
from tests.trainers.checkpoint import synthetic
from tests.trainers.checkpoint.saving import intent_of, original, restored, start
from tests.trainers.checkpoint.synthetic import NOON

ROOT = Path(__file__).resolve().parents[3]
SOON = 300.0
"""Seconds that no test waits in full. Writers give way to whatever else the machine does."""


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)


class Run:
    """The ranks of one attempt, in one process, over a folder."""

    def __init__(self, folder: Path, world: int = 1, keep_last: int = 3) -> None:
        self.uri = f"file://{folder}/run"
        self.storage: Storage = open_storage(self.uri)
        self.fence: Fence = start(self.storage)
        self.world, self.keep_last = world, keep_last
        self.ranks = [Flushes(self.begin(rank)) for rank in range(world)]

    def begin(self, rank: int) -> Begin:
        return Begin(
            uri=self.uri,
            pvc_root="",
            exclusive=True,
            rank=rank,
            fence=self.fence,
            retention=Retention(keep_last=self.keep_last),
        )

    def intent(self, step: int) -> Intent:
        return intent_of(self.fence, step, self.world)

    def stage(self, step: int, ranks: list[int] | None = None) -> None:
        intent = self.intent(step)
        for rank in range(self.world) if ranks is None else ranks:
            slices, aux = synthetic.slices(intent, rank), {"rng.json": b"{}"}
            self.ranks[rank].stage(intent, slices, filling(intent), aux, threads=2)

    def settle(self) -> None:
        for flushes in self.ranks:
            assert flushes.wait(partial(is_settled, flushes), deadline())

    def pid(self, rank: int = 0) -> int:
        self.ranks[rank].wait(lambda: self.ranks[rank].writer_pid is not None, deadline())
        pid = self.ranks[rank].writer_pid
        assert pid is not None
        return pid

    def pause(self, rank: int = 0) -> psutil.Process:
        """Stops a writer, as a storage that hangs does."""
        process = psutil.Process(self.pid(rank))
        process.suspend()
        return process

    def steps(self) -> list[int]:
        return sorted(id_.step for id_, listing in listed(self.storage).items() if listing.is_settled)


def is_settled(flushes: Flushes) -> bool:
    return not flushes.is_writing and not flushes.publishing


def deadline() -> float:
    return time.monotonic() + SOON


def filling(intent: Intent) -> Callable[[Slice, memoryview], None]:
    def fill(piece: Slice, target: memoryview) -> None:
        target[:] = next(synthetic.data(intent, [piece]))

    return fill


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(**options: Any) -> Run:
        runs.append(Run(tmp_path, **options))
        return runs[-1]

    yield make
    for made in runs:
        for flushes in made.ranks:
            flushes.close(deadline())


def test_what_was_staged_becomes_a_checkpoint_with_every_byte(run: Callable[..., Run]) -> None:
    of_three = run(world=3)
    of_three.stage(1)
    of_three.settle()
    published = of_three.ranks[0].published
    assert published is not None
    found = find_newest(of_three.storage, deep=True)
    assert found.rejected == ()
    assert found.manifest is not None
    assert restored(of_three.storage, found.manifest) == original(found.manifest.intent)
    assert (published.step, published.world_size, published.bytes) == (1, 3, found.manifest.bytes)
    assert published.uri == f"{of_three.uri}/ckpt/{found.manifest.id}"


def test_buffers_are_used_again_and_old_checkpoints_are_swept(run: Callable[..., Run]) -> None:
    alone = run(keep_last=2)
    for step in range(1, 6):
        alone.stage(step)
        alone.settle()
    alone.ranks[0].close(deadline())
    assert alone.steps() == [4, 5]
    newest = find_newest(alone.storage, deep=True).manifest
    assert newest is not None
    assert restored(alone.storage, newest) == original(newest.intent)


def test_one_is_written_and_one_waits_and_for_a_third_there_is_no_room(run: Callable[..., Run]) -> None:
    alone = run()
    writer = alone.pause()
    alone.stage(1)
    assert not alone.ranks[0].is_behind
    alone.stage(2)
    assert alone.ranks[0].is_behind
    writer.resume()
    assert alone.ranks[0].wait(lambda: not alone.ranks[0].is_behind, deadline())
    alone.stage(3)
    alone.settle()
    assert alone.steps() == [1, 2, 3]


def test_a_storage_that_hangs_holds_up_neither_steps_nor_the_end_of_a_training(run: Callable[..., Run]) -> None:
    alone = run()
    writer = alone.pause()
    for step in (1, 2):
        alone.stage(step)
    for _ in range(100):
        alone.ranks[0].poll()
    assert alone.ranks[0].is_behind, "whoever skips goes on"
    alone.ranks[0].close(time.monotonic())
    assert alone.steps() == []
    writer.resume()
    until(lambda: alone.steps() == [1, 2])


def test_what_was_staged_does_not_change_when_its_source_does(run: Callable[..., Run]) -> None:
    alone = run()
    writer, intent = alone.pause(), alone.intent(1)
    source = {piece: bytearray(next(synthetic.data(intent, [piece]))) for piece in synthetic.slices(intent, 0)}

    def fill(piece: Slice, target: memoryview) -> None:
        target[:] = source[piece]

    alone.ranks[0].stage(intent, list(source), fill, {})
    for content in source.values():
        content[:] = bytes(len(content))
    writer.resume()
    alone.settle()
    manifest = find_newest(alone.storage, deep=True).manifest
    assert manifest is not None
    assert restored(alone.storage, manifest) == original(intent)


def test_a_writer_that_is_killed_is_told_and_the_next_checkpoint_has_another(run: Callable[..., Run]) -> None:
    alone = run()
    writer = alone.pause()
    alone.stage(1)
    writer.kill()
    assert alone.ranks[0].wait(lambda: 1 in alone.ranks[0].failures, deadline())
    assert "has died" in alone.ranks[0].failures[1]
    alone.stage(2)
    alone.settle()
    assert alone.steps() == [2]
    assert alone.pid() != writer.pid


def test_what_a_killed_writer_had_begun_is_no_ones_any_more_when_the_next_one_saves(run: Callable[..., Run]) -> None:
    pair = run(world=2, keep_last=1)
    pair.stage(1, ranks=[0])
    assert pair.ranks[0].wait(lambda: not pair.ranks[0].is_writing, deadline())
    psutil.Process(pair.pid()).kill()
    assert pair.ranks[0].wait(lambda: 1 in pair.ranks[0].failures, deadline())
    assert [listing.is_open for listing in listed(pair.storage).values()] == [True]
    pair.stage(2)
    pair.settle()
    pair.ranks[0].close(deadline())
    assert [id_.step for id_ in listed(pair.storage)] == [2]


def test_the_first_rank_waits_for_the_others(run: Callable[..., Run]) -> None:
    pair = run(world=2)
    pair.stage(1, ranks=[0])
    assert pair.ranks[0].wait(lambda: not pair.ranks[0].is_writing, deadline())
    assert pair.ranks[0].publishing
    assert pair.steps() == []
    pair.stage(1, ranks=[1])
    pair.settle()
    assert pair.steps() == [1]


def test_a_checkpoint_that_another_rank_could_not_write_is_given_up(run: Callable[..., Run]) -> None:
    pair = run(world=2)
    pair.stage(1, ranks=[0])
    pair.ranks[0].give_up(1, "rank 1 has no space")
    pair.settle()
    assert pair.ranks[0].failures == {1: "rank 1 has no space"}
    assert find_newest(pair.storage).manifest is None
    pair.stage(2)
    pair.settle()
    assert find_newest(pair.storage).manifest is not None


def test_an_attempt_that_was_superseded_publishes_nothing_and_hears_of_it(run: Callable[..., Run]) -> None:
    alone = run()
    take_fence(alone.storage, "the next attempt", NOON)
    alone.stage(1)
    alone.settle()
    assert "superseded" in (alone.ranks[0].superseded or "")
    assert find_newest(alone.storage).manifest is None


def test_a_full_disk_is_told_with_its_numbers(run: Callable[..., Run]) -> None:
    alone = run()
    psutil.Process(alone.pid()).rlimit(psutil.RLIMIT_FSIZE, (4096, 4096))
    alone.stage(1)
    alone.settle()
    assert "shard-00000-000.safetensors: File too large" in alone.ranks[0].failures[1]
    assert find_newest(alone.storage).manifest is None


def test_a_writer_ends_when_there_is_nothing_more_to_do(run: Callable[..., Run]) -> None:
    alone = run()
    writer = psutil.Process(alone.pid())
    alone.stage(1)
    alone.ranks[0].close()
    until(lambda: not is_alive(writer))
    assert alone.steps() == [1]


def test_a_trainer_that_is_killed_right_after_staging_loses_nothing(tmp_path: Path) -> None:
    """The whole group is killed, as a terminal or a supervisor does it; the writers are asleep at that moment."""
    uri = f"file://{tmp_path}/run"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.trainers.checkpoint.stager", uri],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as trainer:
        assert trainer.stdout is not None
        writers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()[1:]]
        assert trainer.stdout.readline() == "staged 1\n"
        os.killpg(trainer.pid, signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
    storage = open_storage(uri)
    assert find_newest(storage).manifest is None
    assert all(writer.is_running() for writer in writers)
    for writer in writers:
        writer.resume()
    until(lambda: not any(is_alive(writer) for writer in writers))
    found = find_newest(storage, deep=True)
    assert found.manifest is not None
    assert list(storage.list(layout.BUSY)) == []
    assert restored(storage, found.manifest) == original(found.manifest.intent)


def test_a_writer_is_small_and_knows_no_torch(run: Callable[..., Run]) -> None:
    writer = psutil.Process(run().pid())
    mapped = {Path(mapping.path).name for mapping in writer.memory_maps()}
    assert not any("torch" in name for name in mapped)
    assert writer.memory_info().rss < 100 << 20
    assert writer.nice() == min(psutil.Process().nice() + 15, 19)
