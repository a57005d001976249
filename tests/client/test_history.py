"""The figures of a job's steps, out of the logs of its attempts, and following it with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from finetune_api.figures import line_of
from finetune_api.job import Phase
from finetune_client.errors import NoLog, NotAllowed
from finetune_client.history import Moment, history_of, moments
from finetune_client.views import JobView, LogChoice, LogLine
from finetune_operator.kinds import Key
from tests.client.conftest import JOB
from tests.factories import with_changes

KEY = Key("default", "tiny")
NOW = "2026-01-01T12:00:00Z"


def view(phase: str, num_attempts: int = 1, step: int = 0, **status: Any) -> JobView:
    """A job whose newest attempt goes on until it is over."""
    over = phase in ("Succeeded", "Failed")
    attempts = [
        {"number": number, "rayJob": f"tiny-{number}", "createdAt": NOW}
        | ({"endedAt": NOW} if over or number < num_attempts else {})
        for number in range(1, num_attempts + 1)
    ]
    known = {"phase": phase, "observedGeneration": 1, "attempts": attempts}
    known |= {"finishedAt": NOW} if over else {}
    known |= {"progress": {"step": step, "metrics": {"loss": str(3.0 - step)}}} if step else {}
    return JobView.of(with_changes(JOB, {"metadata.generation": 1, "status": known | status}))


class Scripted:
    """A backend that shows views one after the other, and has logs by attempt; an exception stands for one it lacks."""

    def __init__(self, views: Sequence[JobView], logs: dict[int, list[str] | Exception]) -> None:
        self.views, self.logs_of, self.asked = views, logs, list[tuple[int | None, bool]]()

    async def get(self, key: Key) -> JobView:
        return self.views[-1]

    async def watch(self, key: Key) -> AsyncGenerator[JobView]:
        for one in self.views:
            yield one
            for _ in range(10):  # what is read meanwhile
                await asyncio.sleep(0)
        await asyncio.Event().wait()

    async def logs(self, key: Key, which: LogChoice, follow: bool) -> AsyncGenerator[LogLine]:
        assert which.attempt is not None
        self.asked.append((which.attempt, follow))
        lines = self.logs_of[which.attempt]
        if isinstance(lines, Exception):
            raise lines
        for line in lines:
            yield LogLine("trainer.log", line)


def steps(first: int, last: int, loss: float) -> list[str]:
    lines = [f"worker 0 INFO {line_of(step, {'loss': loss - step / 100})}" for step in range(first, last + 1)]
    return ["the trainers start", *lines]


def read(views: Sequence[JobView], logs: dict[int, list[str] | Exception]) -> list[dict[str, float]]:
    backend: Any = Scripted(views, logs)
    return asyncio.run(history_of(backend, KEY))


def followed(views: Sequence[JobView], logs: dict[int, list[str] | Exception]) -> tuple[list[Moment], Scripted]:
    scripted = Scripted(views, logs)
    backend: Any = scripted

    async def collect() -> list[Moment]:
        return [moment async for moment in moments(backend, KEY)]

    return asyncio.run(collect()), scripted


def test_there_is_a_row_for_each_step_with_all_that_was_logged_of_it() -> None:
    lines = [f"INFO {line_of(2, {'loss': 1.5})}", f"INFO {line_of(1, {'loss': 2.0})}"]
    lines.append(f"INFO {line_of(2, {'eval_loss': 1.75})}")
    assert read([view("Running")], {1: lines}) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5, "eval_loss": 1.75},
    ]


def test_of_a_step_that_two_attempts_made_the_later_one_counts() -> None:
    rows = read([view("Running", num_attempts=2)], {1: steps(1, 3, 2.0), 2: steps(3, 4, 1.0)})
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.99), (2, 1.98), (3, 0.97), (4, 0.96)]


def test_an_attempt_without_a_log_is_left_out_and_without_any_it_is_said_why() -> None:
    gone = NoLog("the pods of attempt 1 are gone")
    assert len(read([view("Running", num_attempts=2)], {1: gone, 2: steps(3, 4, 1.0)})) == 2
    with pytest.raises(NoLog, match="the pods of attempt 1 are gone"):
        read([view("Succeeded")], {1: gone})
    assert read([view("Pending", num_attempts=0)], {}) == []


def test_following_shows_every_change_with_the_figures_until_the_job_has_ended() -> None:
    seen, _ = followed(
        [view("Pending", num_attempts=0), view("Running"), view("Running", step=2), view("Succeeded", step=3)],
        {1: steps(1, 3, 2.0)},
    )
    assert [moment.view.phase for moment in seen] == [Phase.PENDING, Phase.RUNNING, Phase.RUNNING, Phase.SUCCEEDED]
    assert [len(moment.metrics) for moment in seen][0::3] == [0, 3]
    assert seen[-1].metrics[-1] == {"step": 3, "loss": 1.97}


def test_following_ends_with_a_job_that_is_suspended() -> None:
    seen, _ = followed([view("Running"), view("Suspended")], {1: steps(1, 3, 2.0)})
    assert (seen[-1].view.phase, len(seen[-1].metrics)) == (Phase.SUSPENDED, 3)


def test_a_log_that_broke_off_is_read_again_and_one_that_is_complete_is_not() -> None:
    running = [view("Running", 2, step=step) for step in (1, 2)]
    _, backend = followed([*running, view("Succeeded", 2)], {1: steps(1, 2, 2.0), 2: steps(2, 3, 1.0)})
    assert backend.asked == [(1, True), (2, True), (2, True)]


def test_who_may_not_read_the_log_has_the_figures_that_the_status_told() -> None:
    seen, _ = followed(
        [view("Running", step=1), view("Running", step=2), view("Succeeded", step=2)],
        {1: NotAllowed("you may not read the log")},
    )
    assert seen[-1].metrics == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_a_moment_is_short_where_it_is_printed() -> None:
    moment = Moment(view("Running", step=2), [{"step": 1, "loss": 2.0}])
    assert repr(moment) == "<tiny in default: Running, step 2, loss 1.0> with the figures of 1 steps"
