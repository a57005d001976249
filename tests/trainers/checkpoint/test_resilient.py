"""What may work in a moment is tried again, with pauses; what will not is told at once."""

from __future__ import annotations

import random

import pytest

from finetune_trainers.checkpoint.storage.errors import (
    StorageConflictError,
    StorageFullError,
    StorageUnavailableError,
)
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.resilient import Patience, ResilientStorage
from tests.trainers.checkpoint.faulting import FaultingStorage, Kind, Schedule, SimulatedDisk


class Burst(Schedule):
    """The first `length` requests fail before they have an effect: a store that answers 503 for a while."""

    def __init__(self, length: int, kind: Kind = "unavailable") -> None:
        super().__init__(kind=kind)
        self.length = length

    def boundary(self, what: str) -> None:
        self.at = self.passed if self.passed < self.length else None
        super().boundary(what)


def resilient(schedule: Schedule, num_tries: int = 6) -> tuple[ResilientStorage, list[float]]:
    pauses: list[float] = []
    inner = FaultingStorage(PosixStorage("/run", SimulatedDisk()), schedule)
    patience = Patience(num_tries, first_pause_seconds=1, longest_pause_seconds=4)
    return ResilientStorage(inner, patience, pauses.append, random.Random(7)), pauses


def test_a_burst_of_failures_is_waited_out() -> None:
    storage, pauses = resilient(Burst(5))
    storage.create("x", b"1")
    assert storage.read("x") == b"1"
    assert len(pauses) == 5


def test_pauses_double_up_to_a_limit_and_are_jittered() -> None:
    pauses = list(Patience(8, 1, 4).pauses(random.Random(7)))
    assert len(pauses) == 7
    assert all(0 <= pause <= limit for pause, limit in zip(pauses, [1, 2, 4, 4, 4, 4, 4], strict=True))
    assert list(Patience(8, 1, 4).pauses(random.Random(8))) != pauses


def test_patience_ends() -> None:
    storage, pauses = resilient(Burst(100), num_tries=3)
    with pytest.raises(StorageUnavailableError):
        storage.read("x")
    assert len(pauses) == 2


def test_a_full_disk_is_told_at_once() -> None:
    storage, pauses = resilient(Burst(100, "full"))
    with pytest.raises(StorageFullError):
        storage.create("x", b"1")
    assert pauses == []


def test_a_file_of_somebody_else_stays_a_conflict() -> None:
    storage, pauses = resilient(Schedule())
    storage.create("x", b"theirs")
    with pytest.raises(StorageConflictError):
        storage.create("x", b"mine")
    assert storage.read("x") == b"theirs"
    assert pauses == []


def test_the_same_bytes_are_taken_for_ones_own() -> None:
    """A library below may have sent the request twice without telling."""
    storage, _ = resilient(Schedule())
    storage.create("x", b"mine")
    storage.create("x", b"mine")


def test_a_large_file_of_somebody_else_stays_a_conflict() -> None:
    storage, _ = resilient(Schedule())
    storage.write("x", lambda: [b"abc"], 3)
    storage.write("x", lambda: [b"ab", b"c"], 3)
    for other in (b"xyz", b"abcd"):
        with pytest.raises(StorageConflictError):
            storage.write("x", lambda content=other: [content], len(other))  # type: ignore[misc]
    assert storage.read("x") == b"abc"


def test_content_is_made_again_for_every_try() -> None:
    made = []

    def parts() -> list[bytes]:
        made.append(1)
        return [b"ab", b"c"]

    storage, _ = resilient(Schedule(at=2, kind="unavailable"))  # at the second part
    storage.write("x", parts, 3)
    assert storage.read("x") == b"abc"
    assert len(made) == 2
