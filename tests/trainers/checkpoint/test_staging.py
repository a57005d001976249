"""Shared memory for staging, and what a writer decides, without a process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.commit import abandon
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.staging import ALIGNMENT, Buffer, laid_out
from finetune_trainers.checkpoint.storage.errors import StorageFullError, StorageUnavailableError
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Stored
from finetune_trainers.checkpoint.writer import (
    ORPHAN_SECONDS,
    RECEIPT_SECONDS,
    SILENCE_SECONDS,
    Receipts,
    demand_space,
)
from finetune_trainers.checkpoint.writer_protocol import Failed, Flush, line, said, told
from tests.trainers.checkpoint.faulting import SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, save, start, write_all


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    made = Buffer()
    yield made
    made.close()


def test_pieces_lie_one_after_the_other_each_at_a_round_place() -> None:
    placed = laid_out([1, 64, 65, 0, 8], begin=3)
    assert placed.offsets == (64, 128, 192, 320, 320)
    assert placed.size == 328
    assert all(offset % ALIGNMENT == 0 for offset in placed.offsets)


def test_what_is_put_into_a_buffer_is_seen_by_whoever_has_its_file(buffer: Buffer) -> None:
    buffer.reserve(10)
    buffer.view(2, 5)[:] = b"abc"
    with mmap.mmap(buffer.file, 10, prot=mmap.PROT_READ) as other:
        assert other[:6] == b"\0\0abc\0"
        buffer.view(2, 3)[:] = b"x"
        assert other[2:3] == b"x"


def test_a_buffer_grows_and_keeps_its_memory_when_less_is_needed(buffer: Buffer) -> None:
    sizes = []
    for needed in (100, 5000, 10):
        buffer.reserve(needed)
        sizes.append(os.fstat(buffer.file).st_size)
    assert sizes == [100, 5000, 5000]


def test_a_buffer_that_is_closed_has_let_go_of_its_memory(buffer: Buffer) -> None:
    buffer.reserve(1 << 20)
    file = buffer.file
    buffer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    buffer.close()


class Patience:
    """A clock that moves while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("orphaned_at", "beats_until", "seconds"),
    [
        (None, 0.0, RECEIPT_SECONDS),
        (0.0, 1e6, ORPHAN_SECONDS),
        (0.0, 100.0, 100.0 + SILENCE_SECONDS),
        (0.0, 0.0, SILENCE_SECONDS),
    ],
    ids=["the trainer lives", "the other writer is at work", "the other writer dies", "the other machine is lost"],
)
def test_receipts_that_do_not_come_are_not_waited_for_for_ever(
    orphaned_at: float | None, beats_until: float, seconds: float, tmp_path: Path
) -> None:
    storage, time = open_storage(f"file://{tmp_path}/run"), Patience()
    intent = intent_of(start(storage), 1, world=3)
    write_all(storage, intent, ranks=[0, 2])

    def wait(seconds: float) -> None:
        time.wait(seconds)
        if time.now < beats_until:
            storage.replace(layout.busy(intent.epoch, 1), str(time.now).encode())

    receipts = Receipts(storage, time.clock, wait)
    receipts.orphaned_at = orphaned_at
    reason = receipts.missing(intent.id, 3)
    assert time.now == pytest.approx(seconds, abs=3)
    assert reason is not None
    assert reason.startswith("rank 1 has not written its part")


def test_receipts_are_waited_for_while_the_storage_cannot_be_reached(tmp_path: Path) -> None:
    time = Patience()

    class Flaky(PosixStorage):
        def list(self, prefix: str) -> Iterator[Stored]:
            if 1 < time.now < 60:
                raise StorageUnavailableError("503")
            return super().list(prefix)

    storage = Flaky(str(tmp_path))
    intent = intent_of(start(storage), 1, world=2)
    write_all(storage, intent, ranks=[0])

    def wait(seconds: float) -> None:
        time.wait(seconds)
        if time.now > 90 and storage.size(layout.receipt(intent.id, 1)) is None:
            storage.create(layout.receipt(intent.id, 1), b"{}")

    assert Receipts(storage, time.clock, wait).missing(intent.id, 2) is None
    assert 90 < time.now < 95


def test_what_failed_saves_have_left_makes_room_for_the_next(tmp_path: Path) -> None:
    disk = SimulatedDisk()
    storage = PosixStorage("/run", disk)
    fence = start(storage)
    save(storage, fence, 1)
    write_all(storage, intent_of(fence, 2))
    abandon(storage, fence, CheckpointId(1, 2), "the storage was full")
    disk.capacity = disk.used + 1000
    demand_space(storage, intent_of(fence, 3))
    assert [id_.step for id_ in listed(storage)] == [1]
    assert (storage.free_bytes() or 0) > 22412


def test_a_checkpoint_that_will_not_fit_is_not_begun(tmp_path: Path) -> None:
    class Small(PosixStorage):
        def free_bytes(self) -> int:
            return 1000

    storage = Small(str(tmp_path))
    with pytest.raises(StorageFullError, match=r"needs 22412 bytes, and 1000 are free at file:///"):
        demand_space(storage, intent_of(start(storage), 1))


def test_a_message_arrives_as_it_was_sent_and_another_versions_is_refused() -> None:
    flush = Flush(buffer=1, start=64, end=1 << 33)
    assert told(line(flush)) == flush
    failed = Failed(step=3, reason="no\nspace")
    assert line(failed).count(b"\n") == 1
    assert said(line(failed)) == failed
    with pytest.raises(ValueError, match="no message of version 1"):
        told(line(flush).replace(b'"version":1', b'"version":2'))
    with pytest.raises(ValueError, match="no message"):
        told(line(failed))
