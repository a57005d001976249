"""Passes are retried, spaced, bounded and counted, and no failure of one ends a worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from finetune_operator.errors import Conflict, TooManyRequests, Unreachable
from finetune_operator.kinds import Key
from finetune_operator.metrics import Metrics
from finetune_operator.runtime.controller import Controller
from finetune_operator.runtime.workqueue import WorkQueue
from tests.operator.runtime.virtual_time import run, settle

A, B = Key("default", "a"), Key("default", "b")


class Passes:
    """A reconcile that does as it is told, in order, and then nothing."""

    def __init__(self, *results: Exception | float | Callable[[], Awaitable[float | None]] | None) -> None:
        self.times: list[tuple[Key, float]] = []
        self._results = list(results)

    async def __call__(self, key: Key) -> float | None:
        self.times.append((key, now()))
        result = self._results.pop(0) if self._results else None
        if isinstance(result, Exception):
            raise result
        return await result() if callable(result) else result


@asynccontextmanager
async def controlling(reconcile: Any, num_workers: int = 2, **options: Any) -> AsyncIterator[WorkQueue[Key]]:
    queue: WorkQueue[Key] = WorkQueue("job")
    task = asyncio.create_task(Controller("job", queue, reconcile, num_workers, **options).run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_key_is_looked_at_again_when_the_pass_says_so() -> None:
    async def main() -> None:
        passes = Passes(30, 5, None)
        async with controlling(passes) as queue:
            queue.add(A)
            await asyncio.sleep(3600)
        assert passes.times == [(A, 0), (A, 30), (A, 35)]

    run(main())


def test_a_pass_that_fails_is_tried_again_at_growing_delays_and_a_success_forgets_them() -> None:
    async def main() -> None:
        passes = Passes(
            ValueError("a bug"), Unreachable("refused"), Unreachable("refused"), None, Unreachable("refused")
        )
        async with controlling(passes) as queue:
            queue.add(A)
            await asyncio.sleep(10)
            assert queue.num_requeues(A) == 0
            queue.add(A)
            await asyncio.sleep(10)
        assert [at for _, at in passes.times] == pytest.approx([0, 0.005, 0.015, 0.035, 10, 10.005], abs=1e-6)

    run(main())


def test_a_server_that_asks_for_patience_is_given_it() -> None:
    async def main() -> None:
        passes = Passes(TooManyRequests(429, "TooManyRequests", "slow down", retry_after=20))
        async with controlling(passes) as queue:
            queue.add(A)
            await asyncio.sleep(60)
        assert [at for _, at in passes.times] == [0, 20]

    run(main())


def test_a_key_that_always_fails_keeps_nobody_from_another() -> None:
    async def main() -> None:
        num_passes = {A: 0, B: 0}

        async def reconcile(key: Key) -> float | None:
            num_passes[key] += 1
            if key == A:
                raise ValueError("a bug")
            return 1

        async with controlling(reconcile, num_workers=1) as queue:
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(100.5)
        assert num_passes[B] == 101
        assert num_passes[A] < 20

    run(main())


def test_workers_work_side_by_side_and_never_on_one_key() -> None:
    async def main() -> None:
        in_work: list[Key] = []
        most = 0

        async def reconcile(key: Key) -> float | None:
            nonlocal most
            assert key not in in_work
            in_work.append(key)
            most = max(most, len(in_work))
            await asyncio.sleep(1)
            in_work.remove(key)
            return None

        async with controlling(reconcile, num_workers=3) as queue:
            for number in range(9):
                queue.add(Key("default", str(number % 5)))
            await asyncio.sleep(0.5)
            for number in range(5):
                queue.add(Key("default", str(number)))
            await asyncio.sleep(60)
        assert most == 3

    run(main())


def test_a_pass_that_never_ends_is_cut_off_counted_and_tried_again() -> None:
    async def main() -> None:
        metrics = Metrics()

        async def for_ever() -> float | None:
            await asyncio.Event().wait()
            return None

        passes = Passes(for_ever)
        async with controlling(passes, num_workers=1, pass_seconds=120, metrics=metrics) as queue:
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(200)
        assert passes.times == [(A, 0), (B, 120), (A, pytest.approx(120.005))]
        value = metrics.registry.get_sample_value
        assert value("controller_runtime_reconcile_timeouts_total", {"controller": "job"}) == 1

    run(main())


def test_a_timeout_inside_a_pass_is_a_failure_like_others(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        passes = Passes(TimeoutError("of its own"))
        async with controlling(passes) as queue:
            queue.add(A)
            await asyncio.sleep(1)
        assert len(passes.times) == 2

    run(main())
    assert "of its own" in caplog.text


def test_a_pass_that_waited_for_something_cancelled_does_not_take_its_worker_along() -> None:
    async def main() -> None:
        async def waits_for_something_cancelled() -> float | None:
            inner = asyncio.ensure_future(asyncio.sleep(10, result=1.0))
            asyncio.get_running_loop().call_later(1, inner.cancel)
            return await inner

        passes = Passes(waits_for_something_cancelled)
        async with controlling(passes, num_workers=1) as queue:
            queue.add(A)
            await asyncio.sleep(5)
        assert len(passes.times) == 2

    run(main())


def test_cancelling_cuts_off_the_passes_under_way_and_waits_for_them() -> None:
    async def main() -> None:
        wound_down = []

        async def reconcile(key: Key) -> float | None:
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(1)
                wound_down.append(key)
            return None

        async with controlling(reconcile) as queue:
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(5)
        assert sorted(wound_down) == [A, B]
        assert now() == pytest.approx(6)

    run(main())


def test_after_a_shut_down_what_is_ready_is_worked_off_and_the_controller_ends() -> None:
    async def main() -> None:
        done = []

        async def reconcile(key: Key) -> float | None:
            await asyncio.sleep(1)
            done.append(key)
            return 60

        queue: WorkQueue[Key] = WorkQueue("job")
        running = asyncio.create_task(Controller("job", queue, reconcile, 1).run())
        queue.add(A)
        queue.add(B)
        await settle()
        queue.shut_down()
        await running
        assert done == [A, B]

    run(main())


@pytest.mark.parametrize(
    ("error", "level", "with_traceback"),
    [
        (ValueError("a bug"), logging.ERROR, True),
        (Unreachable("refused"), logging.WARNING, False),
        (Conflict(409, "Conflict", "changed"), logging.INFO, False),
    ],
    ids=["a bug, with its traceback", "a server's fault, without", "a conflict, as a matter of course"],
)
def test_a_failure_is_logged_once_with_its_key(
    error: Exception, level: int, with_traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with controlling(Passes(error)) as queue:
            queue.add(A)
            await asyncio.sleep(1)

    with caplog.at_level(logging.INFO):
        run(main())
    (record,) = caplog.records
    assert record.levelno == level
    assert (record.exc_info is not None) == with_traceback
    assert record.getMessage() == f"job default/a failed for the 1. time in a row: {error}"
    assert (vars(record)["namespace"], vars(record)["job"]) == ("default", "a")


def test_passes_are_counted_by_result_and_timed() -> None:
    async def main() -> None:
        metrics = Metrics()

        def value(name: str, **labels: str) -> float | None:
            return metrics.registry.get_sample_value(f"controller_runtime_{name}", {"controller": "job", **labels})

        async def slow() -> float | None:
            await asyncio.sleep(2)
            return None

        async with controlling(Passes(Unreachable("refused"), 10, slow), num_workers=4, metrics=metrics) as queue:
            queue.add(A)
            await asyncio.sleep(11)
            assert value("active_workers") == 1
            await asyncio.sleep(60)
            assert value("active_workers") == 0
        assert value("max_concurrent_reconciles") == 4
        assert value("reconcile_total", result="error") == 1
        assert value("reconcile_total", result="requeue_after") == 1
        assert value("reconcile_total", result="success") == 1
        assert value("reconcile_errors_total") == 1
        assert value("reconcile_time_seconds_count") == 3
        assert value("reconcile_time_seconds_sum") == pytest.approx(2)

    run(main())
