"""A new attempt and the writers that an earlier one has left: it waits for those that are alive, in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.orphans import PATIENCE_SECONDS, SILENCE_SECONDS, Heartbeat, wait_for_writers
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage


class Writer:
    """Changes its file every two seconds until `ends_at`, and deletes it then unless it is killed; time passes only
    while somebody sleeps."""

    def __init__(self, storage: Storage, ends_at: float, killed: bool = False) -> None:
        self.storage, self.ends_at, self.killed, self.now = storage, ends_at, killed, 0.0
        storage.replace(layout.busy(1, 0), b"0")

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now < self.ends_at:
            self.storage.replace(layout.busy(1, 0), str(self.now // 2).encode())
        elif not self.killed:
            self.storage.delete([layout.busy(1, 0)])


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(f"file://{tmp_path}/run")


def waited(writer: Writer) -> float:
    return wait_for_writers(writer.storage, writer.clock, writer.sleep)


def test_where_no_writer_is_left_nobody_waits(storage: Storage) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError

    assert wait_for_writers(storage, lambda: 0.0, sleep) == 0


def test_one_that_shows_life_is_waited_for(storage: Storage) -> None:
    assert waited(Writer(storage, ends_at=45.0)) == pytest.approx(45, abs=1)


def test_one_that_falls_silent_is_given_up(storage: Storage) -> None:
    assert waited(Writer(storage, ends_at=20.0, killed=True)) == pytest.approx(20 + SILENCE_SECONDS, abs=3)
    assert list(storage.list(layout.BUSY)) == []


def test_one_that_never_ends_does_not_keep_an_attempt_from_beginning(storage: Storage) -> None:
    assert waited(Writer(storage, ends_at=1e6)) == pytest.approx(PATIENCE_SECONDS, abs=1)


def test_a_heartbeat_is_seen_while_it_beats_and_leaves_nothing(storage: Storage) -> None:
    heart = Heartbeat(storage, 1, 0)
    heart.start()
    while storage.size(layout.busy(1, 0)) is None:
        pass
    heart.stop()
    assert list(storage.list(layout.BUSY)) == []
    Heartbeat(storage, 1, 0).stop()
