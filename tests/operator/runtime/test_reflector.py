"""A reflector's store is what the server holds, whatever happens to lists and watches on the way."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.errors import ApiError, Gone, TooManyRequests, Unreachable
from finetune_operator.kinds import Key
from finetune_operator.metrics import Metrics
from finetune_operator.raw import Document, key_of
from finetune_operator.runtime.reflector import Change, Page, Reflector
from tests.operator.runtime.fakes import FakeServer, gone, thing
from tests.operator.runtime.virtual_time import run, settle


class Told:
    """What `on_change` was told, in words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, change: Change) -> None:
        what = "added" if change.old is None else "deleted" if change.new is None else "changed"
        self.words.append(f"{what} {change.key.name}")

    def take(self) -> list[str]:
        words, self.words = self.words, []
        return words


@asynccontextmanager
async def reflecting(server: FakeServer, **options: Any) -> AsyncIterator[tuple[Reflector, Told]]:
    told = Told()
    options = {"on_change": told, "rng": random.Random(1), **options}
    reflector = Reflector(server, "Thing", **options)
    task = asyncio.create_task(reflector.run())
    try:
        await settle()
        yield reflector, told
    finally:
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        assert server.num_open_watches == 0


def names(reflector: Reflector) -> list[str]:
    return sorted(stored["metadata"]["name"] for stored in reflector.store.list())


def now() -> float:
    return asyncio.get_running_loop().time()


def test_what_is_there_and_what_comes_is_stored_and_told() -> None:
    async def main() -> None:
        server = FakeServer()
        server.put(thing("a"))
        async with reflecting(server) as (reflector, told):
            assert reflector.synced.is_set()
            server.put(thing("b"))
            server.put(thing("a", spec=1))
            server.delete("b")
            await settle()
            assert told.words == ["added a", "added b", "changed a", "deleted b"]
            assert names(reflector) == ["a"]
            stored = reflector.store.get(Key("default", "a"))
            assert stored is not None
            assert stored["spec"] == 1

    run(main())


def test_a_change_carries_what_was_and_what_is() -> None:
    async def main() -> None:
        changes: list[Change] = []
        server = FakeServer()
        async with reflecting(server, on_change=changes.append):
            first = server.put(thing("a"))
            second = server.put(thing("a", spec=1))
            server.delete("a")
            await settle()
        assert changes == [Change(None, first), Change(first, second), Change(second, None)]

    run(main())


def test_a_long_list_comes_in_pages() -> None:
    async def main() -> None:
        server = FakeServer()
        for number in range(7):
            server.put(thing(f"t{number}"))
        async with reflecting(server, page_size=3) as (reflector, _):
            assert len(reflector.store) == 7
            assert [(limit, token) for _, limit, token in server.lists] == [(3, None), (3, "3"), (3, "6")]

    run(main())


def test_what_changes_between_two_pages_is_not_missed() -> None:
    class Lively(FakeServer):
        async def list(self, limit: int, continue_token: str | None) -> Page:
            page = await super().list(limit, continue_token)
            if continue_token is None:
                self.put(thing("t0", spec="changed"))
            return page

    async def main() -> None:
        server = Lively()
        for number in range(4):
            server.put(thing(f"t{number}"))
        async with reflecting(server, page_size=2) as (reflector, _):
            assert [stored["metadata"]["name"] for stored in reflector.store.list() if "spec" in stored] == ["t0"]

    run(main())


def test_synced_waits_for_the_last_page() -> None:
    async def main() -> None:
        server = FakeServer()
        for number in range(4):
            server.put(thing(f"t{number}"))
        server.list_faults.extend([None, Unreachable("connection reset")])
        async with reflecting(server, page_size=2) as (reflector, told):
            assert not reflector.synced.is_set()
            assert told.words == []
            assert reflector.problem() == "Thing has not been listed yet: connection reset"
            await asyncio.sleep(1)
            assert reflector.synced.is_set()
            assert reflector.problem() is None

    run(main())


def test_a_watch_that_is_cut_goes_on_where_it_was() -> None:
    async def main() -> None:
        server = FakeServer()
        server.put(thing("a"))
        async with reflecting(server) as (reflector, told):
            server.put(thing("b"))
            await settle()
            server.cut(Unreachable("connection reset"))
            await settle()
            server.put(thing("c"))
            server.delete("a")
            await asyncio.sleep(1)
            assert told.words == ["added a", "added b", "added c", "deleted a"]
            assert names(reflector) == ["b", "c"]
            assert len(server.lists) == 1
            assert [version for _, version, _ in server.watches] == ["101", "102"]

    run(main())


def test_a_watch_that_ends_in_order_is_followed_by_another_at_once() -> None:
    async def main() -> None:
        server = FakeServer()
        async with reflecting(server, watch_seconds=(300, 600)) as (reflector, _):
            await asyncio.sleep(3600)
            times = [begun for begun, _, _ in server.watches]
            lengths = [seconds for _, _, seconds in server.watches]
            assert all(300 <= length <= 600 for length in lengths)
            assert len(set(lengths)) > 1
            assert times[1:] == pytest.approx([begun + length for begun, _, length in server.watches[:-1]], abs=1e-3)
            assert reflector.stale_seconds() <= 60.1

    run(main())


def test_a_bookmark_moves_the_version_on_so_that_a_quiet_kind_needs_no_new_list() -> None:
    async def main() -> None:
        server = FakeServer()
        server.put(thing("a"))
        async with reflecting(server) as (_, told):
            for _ in range(50):
                server.happened_elsewhere()
            await asyncio.sleep(61)
            server.compact()
            server.cut(Unreachable("connection reset"))
            await asyncio.sleep(5)
            assert [version for _, version, _ in server.watches] == ["101", "151"]
            assert len(server.lists) == 1
            assert told.words == ["added a"]

    run(main())


def test_a_forgotten_version_means_a_new_list_that_tells_only_what_differs() -> None:
    async def main() -> None:
        server = FakeServer()
        for name in ("changed", "gone", "same"):
            server.put(thing(name))
        async with reflecting(server) as (reflector, told):
            kept = reflector.store.get(Key("default", "same"))
            told.take()
            server.cut(Unreachable("connection reset"))
            await settle()
            server.put(thing("changed", spec=1))
            server.delete("gone")
            server.put(thing("new"))
            server.compact()
            await asyncio.sleep(5)
            assert told.words == ["deleted gone", "changed changed", "added new"]
            assert reflector.store.get(Key("default", "same")) is kept
            assert len(server.lists) == 2

    run(main())


def test_410_in_the_middle_of_a_watch_means_a_new_list() -> None:
    async def main() -> None:
        server = FakeServer()
        server.put(thing("a"))
        async with reflecting(server) as (_, told):
            server.cut(gone())
            await asyncio.sleep(1)
            server.put(thing("b"))
            await settle()
            assert told.words == ["added a", "added b"]
            assert len(server.lists) == 2

    run(main())


def test_410_between_two_pages_means_one_list_without_pages() -> None:
    async def main() -> None:
        server = FakeServer()
        for number in range(5):
            server.put(thing(f"t{number}"))
        server.list_faults.extend([None, gone()])
        async with reflecting(server, page_size=2) as (reflector, told):
            await asyncio.sleep(1)
            assert [(limit, token) for _, limit, token in server.lists] == [(2, None), (2, "2"), (0, None)]
            assert len(told.words) == len(reflector.store) == 5
            server.cut(gone())
            await asyncio.sleep(5)
            assert server.lists[3][1] == 2

    run(main())


def test_a_server_that_asks_for_patience_is_given_it() -> None:
    async def main() -> None:
        server = FakeServer()
        server.list_faults.append(TooManyRequests(429, "TooManyRequests", "slow down", retry_after=17))
        async with reflecting(server) as (reflector, _):
            await asyncio.sleep(16.9)
            assert len(server.lists) == 1
            await asyncio.sleep(0.2)
            assert len(server.lists) == 2
            assert reflector.synced.is_set()
            server.watch_faults.append(TooManyRequests(429, "TooManyRequests", "slow down", retry_after=23))
            server.cut(Unreachable("connection reset"))
            await asyncio.sleep(23)
            assert len(server.watches) == 2
            await asyncio.sleep(1)
            assert len(server.watches) == 3

    run(main())


def test_delays_double_up_to_half_a_minute_and_a_watch_that_works_ends_them() -> None:
    async def main() -> None:
        server = FakeServer()
        server.list_faults.extend([Unreachable("refused")] * 12)
        async with reflecting(server) as (reflector, _):
            await asyncio.sleep(600)
            times = [at for at, _, _ in server.lists]
            pauses = [later - earlier for earlier, later in pairwise(times)]
            floors = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30, 30]
            assert len(pauses) == len(floors)
            assert all(low <= pause <= 2.001 * low for low, pause in zip(floors, pauses, strict=True))
            assert reflector.synced.is_set()
            server.cut(Unreachable("connection reset"))
            before = now()
            await asyncio.sleep(1)
            assert server.watches[-1][0] - before <= 0.41

    run(main())


def test_a_server_that_lists_and_never_watches_is_not_hurried() -> None:
    async def main() -> None:
        server = FakeServer()
        server.watch_faults.extend([gone()] * 1000)
        async with reflecting(server):
            await asyncio.sleep(300)
            assert len(server.lists) < 20

    run(main())


def test_a_server_that_ends_each_watch_at_once_is_not_asked_in_a_loop() -> None:
    async def main() -> None:
        server = FakeServer()

        class Curt(FakeServer):
            async def watch(self, resource_version: str, timeout_seconds: float) -> AsyncIterator[Any]:
                self.watches.append((now(), resource_version, timeout_seconds))
                return
                yield

        server = Curt()
        async with reflecting(server) as (reflector, _):
            await asyncio.sleep(300)
            assert len(server.watches) < 20
            reason = reflector.problem()
            assert reason is not None
            assert reason.endswith("the watch ended at once")

    run(main())


def test_a_version_that_is_refused_again_and_again_is_given_up_for_a_new_list() -> None:
    async def main() -> None:
        server = FakeServer()
        server.put(thing("a"))
        async with reflecting(server):
            server.watch_faults.extend([ApiError(504, "Timeout", "Too large resource version")] * 5)
            server.cut(Unreachable("connection reset"))
            await asyncio.sleep(60)
            assert len(server.lists) == 2
            assert server.num_open_watches == 1

    run(main())


def test_a_dead_connection_is_left_after_the_idle_time_and_nothing_is_missed() -> None:
    async def main() -> None:
        server = FakeServer()
        async with reflecting(server, idle_seconds=70) as (reflector, told):
            server.silent = True
            server.put(thing("a"))
            await settle()
            assert told.words == []
            await asyncio.sleep(65)
            server.silent = False
            await asyncio.sleep(10)
            assert told.words == ["added a"]
            assert reflector.problem() is None
            assert len(server.lists) == 1

    run(main())


def test_a_list_that_is_never_answered_is_asked_for_again() -> None:
    async def main() -> None:
        server = FakeServer()
        server.silent = True
        async with reflecting(server, idle_seconds=70) as (reflector, _):
            await asyncio.sleep(69)
            server.silent = False
            assert len(server.lists) == 1
            await asyncio.sleep(2)
            assert reflector.synced.is_set()

    run(main())


def test_readiness_tells_when_a_watch_is_stale_and_when_it_is_well_again() -> None:
    async def main() -> None:
        server = FakeServer()
        async with reflecting(server, idle_seconds=70) as (reflector, _):
            server.silent = True
            await asyncio.sleep(200)
            assert reflector.problem() is None
            await asyncio.sleep(20)
            assert reflector.stale_seconds() == pytest.approx(220, abs=1)
            assert reflector.problem() == "nothing was heard of Thing for 220 s: watches stay silent for 70 s"
            server.silent = False
            await asyncio.sleep(140)
            assert reflector.problem() is None

    run(main())


def test_a_quiet_kind_on_a_server_without_bookmarks_is_never_called_stale(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = FakeServer()
        server.bookmark_seconds = None
        async with reflecting(server, idle_seconds=70) as (reflector, _):
            for _ in range(3600):
                await asyncio.sleep(1)
                assert reflector.problem() is None
            assert len(server.lists) == 1

    run(main())
    assert caplog.records == []


def test_before_the_first_list_a_reflector_is_as_stale_as_can_be() -> None:
    assert Reflector(FakeServer(), "Thing", on_change=lambda _: None).stale_seconds() == math.inf


def test_only_the_projection_is_held() -> None:
    async def main() -> None:
        server = FakeServer()
        server.put(thing("a", spec="kept", status="dropped"))

        def project(document: Document) -> Document:
            return {"metadata": document["metadata"], "spec": document["spec"]}

        async with reflecting(server, project=project) as (reflector, told):
            server.put(thing("b", spec="kept", status="dropped"))
            await settle()
            assert [sorted(held) for held in reflector.store.list()] == [["metadata", "spec"]] * 2
            server.cut(gone())
            await asyncio.sleep(1)
            assert told.words == ["added a", "added b"]

    run(main())


def _raises(_: object) -> Any:
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("part", "bug", "stored"),
    [
        ("projection", {"project": _raises}, ["a", "b"]),
        ("listener", {"on_change": _raises}, ["a", "b"]),
        ("indexer", {"indexers": {"by": lambda document: [document["spec"]["none"]]}}, []),
    ],
)
def test_a_bug_in_a_handler_is_logged_and_stops_nothing(
    part: str, bug: dict[str, Any], stored: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = FakeServer()
        server.put(thing("a"))
        async with reflecting(server, **bug) as (reflector, _):
            server.put(thing("b"))
            await settle()
            assert names(reflector) == stored
            assert len(server.lists) == 1

    run(main())
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert "Thing default/a" in caplog.text


def test_a_source_that_breaks_is_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = FakeServer()
        server.watch_faults.append(ValueError("not JSON"))
        async with reflecting(server):
            await asyncio.sleep(1)
            assert len(server.lists) == 2
            assert server.num_open_watches == 1

    run(main())
    assert "the watch broke and begins anew" in caplog.text


def test_an_event_told_twice_is_one_change() -> None:
    async def main() -> None:
        server = FakeServer()
        async with reflecting(server) as (_, told):
            stored = server.put(thing("a"))
            await settle()
            server._history.append((server.version + 1, server._history[-1][1]))
            server.cut(Unreachable("connection reset"))
            await asyncio.sleep(1)
            assert told.words == ["added a"]
            assert stored["metadata"]["resourceVersion"] == "101"

    run(main())


def test_lists_watches_failures_and_holdings_are_counted() -> None:
    async def main() -> None:
        metrics = Metrics()
        server = FakeServer()
        server.put(thing("a"))
        async with reflecting(server, metrics=metrics):
            server.cut(Unreachable("connection reset"))
            await asyncio.sleep(10)
            labels = {"name": "Thing"}
            value: Callable[..., float | None] = metrics.registry.get_sample_value
            assert value("reflector_lists_total", labels) == 1
            assert value("reflector_watches_total", labels) == 2
            assert value("reflector_failures_total", labels) == 1
            assert value("reflector_stored_objects", labels) == 1
            assert value("reflector_stale_seconds", labels) == pytest.approx(10, abs=0.1)

    run(main())


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abcd")),
        st.tuples(st.just("delete"), st.sampled_from("abcd")),
        st.tuples(st.just("wait"), st.floats(0, 100)),
        st.tuples(st.sampled_from(["cut", "gone", "refuse", "compact", "silent", "heard"]), st.none()),
    ),
    max_size=30,
)


@given(_STEPS)
def test_whatever_happens_the_store_and_what_was_told_end_up_as_the_server_is(steps: list[tuple[str, Any]]) -> None:
    async def main() -> None:
        server = FakeServer()
        seen: dict[Key, Document] = {}

        def follow(change: Change) -> None:
            assert seen.get(change.key) == change.old
            assert change.old != change.new
            if change.new is None:
                del seen[change.key]
            else:
                seen[change.key] = change.new

        async with reflecting(server, on_change=follow, page_size=2, idle_seconds=70) as (reflector, _):
            for step, value in steps:
                await _take(step, value, server)
            server.silent = False
            server.list_faults.clear()
            server.watch_faults.clear()
            await asyncio.sleep(300)
            assert {key_of(stored): stored for stored in reflector.store.list()} == server.objects == seen
            assert reflector.problem() is None

    run(main())


async def _take(step: str, value: Any, server: FakeServer) -> None:
    if step == "put":
        server.put(thing(value, spec=server.version))
    elif step == "delete" and Key("default", value) in server.objects:
        server.delete(value)
    elif step == "wait":
        await asyncio.sleep(value)
    elif step == "cut":
        server.cut(Unreachable("connection reset"))
    elif step == "gone":
        server.cut(Gone(410, "Expired", "too old resource version"))
    elif step == "refuse":
        server.list_faults.append(Unreachable("refused"))
        server.watch_faults.append(Unreachable("refused"))
    elif step == "compact":
        server.compact()
    else:
        server.silent = step == "silent"
