"""How far apart checkpoints are, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune_api.plan import CheckpointInterval, CheckpointPlan
from finetune_trainers.save_interval import SaveInterval

AUTO = CheckpointInterval(max_overhead=0.01, min_seconds=60, max_seconds=1800)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def settings(every_steps: int | None = None) -> CheckpointPlan:
    interval = AUTO if every_steps is None else None
    return CheckpointPlan(uri=None, job="j", every_steps=every_steps, interval=interval, keep_last=3, resume=True)


def due_steps(interval: SaveInterval, clock: Clock, step_seconds: float, blocked: float) -> Iterator[int]:
    """The steps at which checkpoints are made, for ever."""
    step = 0
    while True:
        step, clock.now = step + 1, clock.now + step_seconds
        if interval.is_due(step):
            clock.now += blocked
            interval.saved(blocked)
            yield step


def apart(step_seconds: float, blocked: float, flush: float = 0.0) -> int:
    """Steps from the third checkpoint to the fourth: the cost is known by then."""
    clock = Clock()
    interval = SaveInterval(settings(), clock)
    interval.flushed(flush)
    steps = due_steps(interval, clock, step_seconds, blocked)
    _, _, third, fourth = (next(steps) for _ in range(4))
    return fourth - third


def test_a_number_of_steps_is_taken_by_its_word() -> None:
    interval = SaveInterval(settings(5), Clock())
    assert [step for step in range(1, 16) if interval.is_due(step)] == [5, 10, 15]


@pytest.mark.parametrize(
    ("what", "step_seconds", "blocked", "flush", "steps"),
    [
        ("saving costs nothing: as often as may be", 10.0, 0.0, 0.0, 6),
        ("the cost decides: 2 s in every 200 s", 10.0, 2.0, 0.0, 20),
        ("training never goes half an hour without one", 10.0, 60.0, 0.0, 180),
        ("one is written before the next is due", 10.0, 0.0, 160.0, 20),
        ("however long that takes", 10.0, 0.0, 2400.0, 300),
        ("a step is longer than the time between two", 200.0, 0.5, 0.0, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_left_to_the_run_the_distance_follows_from_the_cost(
    what: str, step_seconds: float, blocked: float, flush: float, steps: int
) -> None:
    assert apart(step_seconds, blocked, flush) == steps


@pytest.mark.parametrize("blocked", [0.01, 0.7, 3.0, 11.0])
def test_training_stands_still_for_at_most_a_hundredth_of_the_time(blocked: float) -> None:
    steps = apart(0.5, blocked)
    assert blocked / (steps * 0.5) <= 0.0101


def test_nothing_is_due_where_nobody_asked() -> None:
    nothing = settings().model_copy(update={"interval": None})
    clock = Clock()
    interval = SaveInterval(nothing, clock)
    clock.now += 1e6
    assert not interval.is_due(1)
