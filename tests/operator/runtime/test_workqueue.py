"""The order of keys, the times of retries, and that no two workers ever have the same key."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.metrics import Metrics
from finetune_operator.runtime.limits import TokenBucket, exponential
from finetune_operator.runtime.workqueue import CHANGED, RESYNC, ShutDown, WorkQueue
from tests.operator.runtime.virtual_time import run, settle

Queue = WorkQueue[str]


def now() -> float:
    return asyncio.get_running_loop().time()


async def take(queue: Queue) -> str:
    """One key, worked on in no time."""
    key = await queue.get()
    queue.done(key)
    return key


async def take_all(queue: Queue) -> list[str]:
    return [await take(queue) for _ in range(len(queue))]


def test_keys_come_in_the_order_they_were_added() -> None:
    async def main() -> None:
        queue = Queue("q")
        for key in "cab":
            queue.add(key)
        assert await take_all(queue) == ["c", "a", "b"]

    run(main())


def test_a_key_added_many_times_comes_once() -> None:
    async def main() -> None:
        queue = Queue("q")
        for _ in range(5):
            queue.add("a")
            queue.add_after("a", 3)
        assert len(queue) == 1
        assert await take(queue) == "a"
        await asyncio.sleep(10)
        assert len(queue) == 0

    run(main())


def test_a_worker_waits_for_a_key() -> None:
    async def main() -> None:
        queue = Queue("q")
        getting = asyncio.create_task(queue.get())
        await asyncio.sleep(5)
        assert not getting.done()
        queue.add("a")
        assert await getting == "a"

    run(main())


def test_a_key_added_while_in_work_comes_again_after_it_and_not_before() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add("a")
        key = await queue.get()
        queue.add("a")
        other = asyncio.create_task(queue.get())
        await asyncio.sleep(5)
        assert not other.done()
        queue.done(key)
        assert await other == "a"
        queue.done("a")
        assert len(queue) == 0

    run(main())


def test_the_higher_priority_comes_first_and_adding_again_can_only_raise_it() -> None:
    async def main() -> None:
        queue = Queue("q")
        for key in ("old1", "old2", "raised"):
            queue.add(key, RESYNC)
        queue.add("new", CHANGED)
        queue.add("raised", CHANGED)
        queue.add("new", RESYNC)
        assert await take_all(queue) == ["new", "raised", "old1", "old2"]

    run(main())


def test_a_delayed_key_comes_at_its_time() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add_after("late", 20)
        queue.add_after("soon", 10)
        assert len(queue) == 0
        assert (await take(queue), now()) == ("soon", 10)
        assert (await take(queue), now()) == ("late", 20)

    run(main())


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_delay_of_nothing_is_none(seconds: float) -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add_after("a", seconds)
        assert len(queue) == 1

    run(main())


@pytest.mark.parametrize("delays", [(60, 5), (5, 60)])
def test_of_two_delays_the_earlier_counts_and_the_key_comes_once(delays: tuple[float, float]) -> None:
    async def main() -> None:
        queue = Queue("q")
        for delay in delays:
            queue.add_after("a", delay)
        assert (await take(queue), now()) == ("a", 5)
        await asyncio.sleep(100)
        assert len(queue) == 0

    run(main())


def test_adding_now_takes_the_place_of_a_delay() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add_after("a", 60, priority=CHANGED)
        queue.add("b", RESYNC)
        queue.add("a", RESYNC)
        assert await take_all(queue) == ["a", "b"]
        await asyncio.sleep(100)
        assert len(queue) == 0

    run(main())


def test_a_delay_that_was_overtaken_does_not_bring_the_next_one_forward() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add_after("a", 60)
        queue.add("a")
        await take(queue)
        queue.add_after("a", 100)
        assert (await take(queue), now()) == ("a", 100)

    run(main())


def test_a_delay_that_ends_while_the_key_is_in_work_waits_for_it() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add("a")
        key = await queue.get()
        queue.add_after("a", 5)
        other = asyncio.create_task(queue.get())
        await asyncio.sleep(30)
        assert not other.done()
        queue.done(key)
        assert (await other, now()) == ("a", 30)

    run(main())


def test_retries_wait_from_five_milliseconds_doubling_to_a_thousand_seconds() -> None:
    async def main() -> None:
        queue = Queue("q")
        waits = []
        for failures in range(20):
            assert queue.num_requeues("a") == failures
            before = now()
            queue.add_rate_limited("a")
            await take(queue)
            waits.append(now() - before)
        assert waits[:4] == pytest.approx([0.005, 0.01, 0.02, 0.04])
        assert waits[16:] == pytest.approx([327.68, 655.36, 1000, 1000])
        queue.forget("a")
        assert queue.num_requeues("a") == 0
        before = now()
        queue.add_rate_limited("a")
        await take(queue)
        assert now() - before == pytest.approx(0.005)

    run(main())


def test_all_retries_together_are_a_hundred_at_once_and_then_ten_a_second() -> None:
    async def main() -> None:
        queue = Queue("q")
        for number in range(150):
            queue.add_rate_limited(str(number))
        await asyncio.sleep(0.01)
        assert len(queue) == 100
        await asyncio.sleep(2)
        assert len(queue) == 120
        await asyncio.sleep(3)
        assert len(queue) == 150

    run(main())


def test_a_retry_waits_at_least_as_long_as_the_server_asked() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add_rate_limited("a", at_least=30)
        assert (await take(queue), now()) == ("a", 30)

    run(main())


def test_what_is_added_at_once_is_not_rate_limited() -> None:
    async def main() -> None:
        queue = Queue("q")
        for number in range(1000):
            queue.add(str(number))
        assert len(await take_all(queue)) == 1000
        assert now() == 0

    run(main())


def test_a_bucket_refills_to_its_burst_and_no_further() -> None:
    bucket = TokenBucket(10, 2)
    assert [bucket.reserve(0) for _ in range(4)] == pytest.approx([0, 0, 0.1, 0.2])
    assert [bucket.reserve(100) for _ in range(3)] == pytest.approx([0, 0, 0.1])


def test_any_number_of_failures_has_a_delay() -> None:
    assert exponential(10**9, 0.005, 1000) == 1000


def test_shutting_down_hands_out_what_is_ready_and_drops_what_is_delayed() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add("a")
        queue.add("b")
        queue.add_after("c", 1)
        queue.shut_down()
        queue.add("d")
        queue.add_after("d", 1)
        queue.add_rate_limited("d")
        assert await take_all(queue) == ["a", "b"]
        with pytest.raises(ShutDown):
            await queue.get()
        await asyncio.sleep(5)
        assert len(queue) == 0

    run(main())


def test_shutting_down_wakes_all_workers_that_wait() -> None:
    async def main() -> None:
        queue = Queue("q")
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        await settle()
        queue.shut_down()
        ends = await asyncio.gather(*workers, return_exceptions=True)
        assert [type(end) for end in ends] == [ShutDown] * 3

    run(main())


def test_a_key_in_work_that_was_added_again_still_comes_after_a_shut_down() -> None:
    async def main() -> None:
        queue = Queue("q")
        queue.add("a")
        key = await queue.get()
        queue.add("a")
        queue.shut_down()
        queue.done(key)
        assert await take(queue) == "a"

    run(main())


def test_a_key_is_not_lost_with_a_worker_that_is_cancelled_as_it_is_woken() -> None:
    async def main() -> None:
        queue = Queue("q")
        first, second = asyncio.create_task(queue.get()), asyncio.create_task(queue.get())
        await settle()
        queue.add("a")
        first.cancel()
        assert await second == "a"
        assert first.cancelled()

    run(main())


def test_nobody_is_woken_for_a_worker_that_has_given_up() -> None:
    async def main() -> None:
        queue = Queue("q")
        first = asyncio.create_task(queue.get())
        await settle()
        first.cancel()
        await settle()
        queue.add("a")
        assert await take(queue) == "a"

    run(main())


def test_wishes_that_were_overtaken_do_not_pile_up() -> None:
    async def main() -> None:
        queue = Queue("q")
        for _ in range(1000):
            for key in ("a", "b", "c"):
                queue.add_after(key, 36000)
                queue.add(key)
            await take_all(queue)
        assert len(queue._later) < 100

    run(main())


def test_a_queue_that_moves_its_delays_about_keeps_their_times() -> None:
    async def main() -> None:
        queue = Queue("q")
        rng = random.Random(3)
        due: dict[str, float] = {}
        for _ in range(2000):
            key, at = str(rng.randrange(50)), rng.uniform(1, 1000)
            queue.add_after(key, at)
            due[key] = min(at, due.get(key, at))
        came = [(await take(queue), round(now(), 6)) for _ in due]
        assert came == [(key, round(at, 6)) for key, at in sorted(due.items(), key=lambda item: item[1])]

    run(main())


def test_depth_adds_retries_and_durations_are_measured() -> None:
    async def main() -> None:
        metrics = Metrics()
        queue = Queue("job", metrics=metrics)
        labels = {"name": "job", "controller": "job"}

        def value(name: str) -> float | None:
            return metrics.registry.get_sample_value(f"workqueue_{name}", labels)

        queue.add("a")
        queue.add("a", priority=CHANGED + 1)
        queue.add("b")
        queue.add_after("c", 60)
        queue.add_rate_limited("d")
        assert (value("depth"), value("adds_total"), value("retries_total")) == (2, 2, 1)
        await asyncio.sleep(4)
        key = await queue.get()
        assert value("queue_duration_seconds_sum") == 4
        await asyncio.sleep(3)
        await queue.get()
        await asyncio.sleep(2)
        assert value("longest_running_processor_seconds") == 5
        assert value("unfinished_work_seconds") == 7
        queue.done(key)
        assert value("work_duration_seconds_sum") == 5
        assert value("longest_running_processor_seconds") == 2
        await asyncio.sleep(100)
        assert (value("depth"), value("adds_total")) == (2, 4)

    run(main())


_KEYS = st.sampled_from("abc")
_SECONDS = st.floats(0, 5)
_PRIORITIES = st.sampled_from([RESYNC, CHANGED])
_ADDS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), _KEYS, _PRIORITIES),
        st.tuples(st.just("after"), _KEYS, _SECONDS),
        st.tuples(st.just("retry"), _KEYS, st.none()),
        st.tuples(st.just("wait"), _KEYS, _SECONDS),
        st.tuples(st.just("cancel"), _KEYS, st.integers(0, 3)),
    ),
    max_size=40,
)


@given(_ADDS, st.integers(1, 4), st.lists(_SECONDS, min_size=1, max_size=5))
def test_no_two_workers_have_one_key_and_every_wish_is_followed_by_a_pass(
    steps: list[tuple[str, str, Any]], num_workers: int, durations: list[float]
) -> None:
    async def main() -> None:
        queue = Queue("q")
        in_work: Counter[str] = Counter()
        begun: dict[str, float] = {}
        wished: dict[str, float] = {}
        passes = 0

        async def work() -> None:
            nonlocal passes
            while True:
                try:
                    key = await queue.get()
                except ShutDown:
                    return
                in_work[key] += 1
                assert in_work[key] == 1
                begun[key] = now()
                passes += 1
                try:
                    await asyncio.sleep(durations[passes % len(durations)])
                finally:
                    in_work[key] -= 1
                    queue.done(key)

        workers = [asyncio.create_task(work()) for _ in range(num_workers)]
        for step, key, value in steps:
            if step == "add":
                queue.add(key, value)
            elif step == "after":
                queue.add_after(key, value)
            elif step == "retry":
                queue.add_rate_limited(key)
            elif step == "wait":
                await asyncio.sleep(value)
            else:
                index = value % num_workers
                workers[index].cancel()
                await asyncio.wait((workers[index],))
                workers[index] = asyncio.create_task(work())
            if step in ("add", "after", "retry"):
                wished[key] = now()
        await asyncio.sleep(1000)
        assert len(queue) == 0
        assert all(begun[key] >= at for key, at in wished.items())
        queue.shut_down()
        await asyncio.gather(*workers)

    run(main())
