"""Whether a run is at work follows from its signs of life, and from nothing that a checkpoint is judged by."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.activity import CARETAKER, InUseError, activity_at, demand_quiet
from finetune_trainers.checkpoint.commit import begin
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.trainers.checkpoint.faulting import SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, save, start, write_all
from tests.trainers.checkpoint.synthetic import NOON

MINUTE = timedelta(minutes=1)


@pytest.fixture
def place() -> Storage:
    return PosixStorage("/run", SimulatedDisk())


def at_work(storage: Storage, minutes: float) -> bool:
    """So long after noon, when the first attempt began."""
    activity = activity_at(storage, NOON + minutes * MINUTE)
    assert activity is not None
    return activity.at_work


def test_where_nobody_ever_was_nobody_is(place: Storage) -> None:
    assert activity_at(place, NOON) is None
    demand_quiet(None, NOON)


def test_an_attempt_counts_as_at_work_for_an_hour_after_it_began(place: Storage) -> None:
    start(place)
    assert [at_work(place, minutes) for minutes in (0, 59, 61)] == [True, True, False]


def test_every_save_is_a_sign_of_life_also_one_that_is_not_finished(place: Storage) -> None:
    fence = start(place)
    save(place, fence, 10, created=NOON + 20 * MINUTE)
    assert [at_work(place, minutes) for minutes in (79, 81)] == [True, False]
    write_all(place, intent_of(fence, 20, created=NOON + 40 * MINUTE), ranks=[])
    assert [at_work(place, minutes) for minutes in (99, 101)] == [True, False]


def test_who_saves_seldom_is_given_three_of_its_longest_pauses(place: Storage) -> None:
    fence = start(place)
    for hours in (2, 4, 7):
        save(place, fence, hours * 10, created=NOON + hours * 60 * MINUTE)
    assert [at_work(place, (7 + hours) * 60) for hours in (8.9, 9.1)] == [True, False]


def test_only_the_newest_attempt_counts(place: Storage) -> None:
    old = start(place)
    begin(place, "next", NOON + 300 * MINUTE)
    write_all(place, intent_of(old, 90, created=NOON + 500 * MINUTE), ranks=[])
    activity = activity_at(place, NOON + 310 * MINUTE)
    assert activity is not None
    assert (activity.owner, activity.epoch, activity.at_work) == ("next", 2, True)
    assert not at_work(place, 361)


def test_a_sign_from_the_future_is_a_sign(place: Storage) -> None:
    begin(place, "a clock that is an hour fast", NOON + 60 * MINUTE)
    assert at_work(place, 0)


def test_a_fence_that_was_taken_by_hand_is_nobodys_work(place: Storage) -> None:
    start(place)
    begin(place, f"{CARETAKER}, ann@host", NOON)
    assert not at_work(place, 1)


def test_an_attempt_whose_fence_cannot_be_read_counts_as_at_work(place: Storage) -> None:
    start(place)
    place.replace(layout.fence(1), b"{}")
    assert at_work(place, 10_000)


def test_a_refusal_says_who_is_at_work_and_how_long_to_wait(place: Storage) -> None:
    begin(place, "team/bot, attempt 1", NOON)
    now = NOON + 50 * MINUTE
    with pytest.raises(InUseError) as caught:
        demand_quiet(activity_at(place, now), now)
    message = caught.value.message
    assert message.startswith("team/bot, attempt 1 seems to be at work there (attempt 1). Its last sign of life was at")
    assert "2026-01-01 12:00:00 UTC; it counts as ended after 10 more minutes of silence" in message
    assert "--take-over" in message
