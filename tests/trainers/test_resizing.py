"""With how many workers a group starts, and what it hears of room for a larger one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune_trainers import resizing
from finetune_trainers.resizing import Growth, Room, first_size
from tests.cluster.processes import wait_until

SIZES = [4, 2, 1]


class Machine:
    """Answers for Ray: there is room for `now` workers, and for `later` when it is waited for."""

    def __init__(self, now: int, later: int | None = None) -> None:
        self.now, self.later = now, later
        self.asked: list[tuple[int, float]] = []

    def room_for(self, num_workers: int, seconds: float) -> bool:
        self.asked.append((num_workers, seconds))
        if seconds >= 300 and self.later is not None:
            self.now = self.later
        return num_workers <= self.now


@pytest.mark.parametrize(
    ("what", "now", "later", "wanted", "size"),
    [
        ("all of them are there", 4, None, 4, 4),
        ("all of them come while they are waited for", 2, 4, 4, 4),
        ("three are there, and three cannot share the batch", 3, None, 4, 2),
        ("one is there", 1, None, 4, 1),
        ("a group grows to fewer than all", 2, None, 2, 2),
        ("what a group was to grow to is gone again", 1, None, 2, 1),
    ],
)
def test_a_group_starts_with_what_is_wanted_or_with_as_many_as_there_is_room_for(
    what: str, now: int, later: int | None, wanted: int, size: int
) -> None:
    machine = Machine(now, later)
    assert first_size(SIZES, wanted, 300, machine.room_for) == size, what
    assert machine.asked[0] == (wanted, 300), "what is wanted is waited for, and first"


def test_the_least_are_waited_for_as_long_as_it_takes() -> None:
    answers = iter([False] * 6 + [True])

    def room_for(num_workers: int, seconds: float) -> bool:
        return next(answers)

    assert first_size([4, 2], 4, 300, room_for) == 2, "the third round has room, at its second question"
    assert next(answers, None) is None


def test_the_least_are_not_waited_for_any_longer_when_all_is_to_stop() -> None:
    asked = iter([False, False, True])
    machine = Machine(0)
    assert first_size(SIZES, 4, 300, machine.room_for, lambda: next(asked)) is None
    assert [num for num, _ in machine.asked] == [4, *SIZES, *SIZES]


def told_by(growth: Growth, told: list[bool], num: int, machine: Machine) -> None:
    """Runs `growth` until it has told so many things, and a little longer: until it has looked twice more."""
    with growth:
        wait_until(lambda: len(told) >= num, "word of room")
        looked = len(machine.asked)
        wait_until(lambda: len(machine.asked) >= looked + 2, "two more looks")


def test_a_group_hears_once_that_there_is_room_for_a_larger_one() -> None:
    told: list[bool] = []
    machine = Machine(1)
    growth = Growth(SIZES, 1, machine.room_for, told.append, seconds=0.01)
    told_by(growth, told, 1, machine)
    assert told == [True]
    assert growth.wanted == 2, "there is room for one more, and three would not do"
    assert machine.asked[:2] == [(3, resizing._ANSWER_SECONDS), (1, resizing._ANSWER_SECONDS)], "all, before some"


def test_a_group_hears_that_the_room_is_gone() -> None:
    told: list[bool] = []
    machine = Machine(3)

    def tell(there_is: bool) -> None:
        told.append(there_is)
        machine.now = 0

    growth = Growth(SIZES, 1, machine.room_for, tell, seconds=0.01)
    told_by(growth, told, 2, machine)
    assert told == [True, False]


def test_what_could_not_be_told_is_told_at_the_next_look(caplog: pytest.LogCaptureFixture) -> None:
    told: list[bool] = []
    machine = Machine(3)

    def tell(there_is: bool) -> None:
        if "cannot be told" not in caplog.text:
            raise ConnectionError("Ray does not answer")
        told.append(there_is)

    growth = Growth(SIZES, 1, machine.room_for, tell, seconds=0.01)
    told_by(growth, told, 1, machine)
    assert told == [True]


def test_a_group_that_ends_while_room_is_looked_for_hears_nothing_of_it() -> None:
    told: list[bool] = []

    def room_for(num_workers: int, seconds: float) -> bool:
        if told:
            growth._over.set()  # as whoever leaves the block does
        return num_workers == 1 and not told

    growth = Growth(SIZES, 1, room_for, told.append, seconds=0.01)
    growth.start()
    growth.join(60)
    assert told == [True]


def test_a_group_of_all_workers_does_not_look() -> None:
    machine = Machine(100)
    with Growth(SIZES, 4, machine.room_for, lambda there_is: None, seconds=0.0) as growth:
        assert not growth.is_alive()
    assert machine.asked == []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """In the place of Ray's."""
    from ray.experimental import internal_kv

    kept: dict[str, bytes] = {}

    def put(key: str, value: bytes, *, namespace: str) -> None:
        kept[key] = value

    def get(key: str, *, namespace: str) -> bytes | None:
        return kept.get(key)

    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", get)
    return kept


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that shows so much more each time."""
    times = iter(range(1000))
    return lambda: next(times) * seconds


def test_rank_0_reads_what_the_driver_has_told_its_group(store: dict[str, bytes]) -> None:
    room, other = Room("run/1", ticking(10)), Room("run/2", ticking(10))
    assert not room.there_is()
    resizing.tell_of_room("run/1", True)
    assert room.there_is()
    assert not other.there_is()
    resizing.tell_of_room("run/1", False)
    assert not room.there_is()


def test_it_asks_ray_no_more_than_once_a_second(store: dict[str, bytes]) -> None:
    times = iter([0.0, 0.0, 0.9, 1.1, 1.1])
    room = Room("run/1", lambda: next(times))
    assert not room.there_is()
    resizing.tell_of_room("run/1", True)
    assert not room.there_is()
    assert room.there_is()


def test_a_ray_that_does_not_answer_changes_nothing(store: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.experimental import internal_kv

    room = Room("run/1", ticking(10))
    resizing.tell_of_room("run/1", True)
    assert room.there_is()

    def silent(key: str, *, namespace: str) -> bytes:
        raise ConnectionError(key)

    monkeypatch.setattr(internal_kv, "_internal_kv_get", silent)
    assert room.there_is()
