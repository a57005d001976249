"""One leads at a time, whatever requests do; and the next one leads soon."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.errors import ApiError, Unreachable
from finetune_operator.metrics import Metrics
from finetune_operator.raw import Document
from finetune_operator.runtime.leader import LeaderElector
from tests.operator.runtime.fakes import FakeLease
from tests.operator.runtime.virtual_time import run, settle

LEASE, RENEW, RETRY = 15, 10, 2
Act = Callable[[], Document | None]


def now() -> float:
    return asyncio.get_running_loop().time()


class Candidate:
    """An elector whose led task notes from when to when it led, and whose requests can be made to suffer."""

    def __init__(self, lease: FakeLease, name: str, seed: int = 0, metrics: Metrics | None = None) -> None:
        self.led: list[tuple[float, float]] = []
        self.leading = False
        self.fault: Exception | None = None
        self.hangs = False
        self.answer_seconds = 0.01
        self.wind_down_seconds = 0.0
        self.ends: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.elector = LeaderElector(
            lease.client(self._around),
            "operator",
            "system",
            name,
            clock=lambda: datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=now()),
            rng=random.Random(seed),
            metrics=metrics,
        )
        self.task = asyncio.create_task(self.elector.run(self._lead))

    async def stop(self) -> None:
        """As on SIGTERM."""
        self.task.cancel()
        await asyncio.wait((self.task,))

    async def _lead(self) -> None:
        begun_at = now()
        self.leading = True
        try:
            await asyncio.shield(self.ends)
        finally:
            await asyncio.sleep(self.wind_down_seconds)
            self.leading = False
            self.led.append((begun_at, now()))

    async def _around(self, act: Act) -> Document | None:
        if self.hangs:
            await asyncio.Event().wait()
        await asyncio.sleep(self.answer_seconds / 2)
        if self.fault is not None:
            raise self.fault
        answer = act()
        await asyncio.sleep(self.answer_seconds / 2)
        return answer


async def kill(candidate: Candidate) -> None:
    """As with SIGKILL: it says nothing more."""
    candidate.fault = Unreachable("killed")
    await candidate.stop()


async def until(condition: Callable[[], bool], seconds: float = 120) -> float:
    """How long it takes until it holds."""
    begun_at = now()
    while not condition():
        assert now() - begun_at < seconds
        await asyncio.sleep(0.05)
    return now() - begun_at


def spec(lease: FakeLease) -> Document:
    assert lease.document is not None
    held: Document = lease.document["spec"]
    return held


def test_the_first_candidate_makes_the_lease_and_leads() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        assert first.leading
        assert first.elector.is_leader
        assert lease.document == {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "operator", "namespace": "system", "resourceVersion": "1"},
            "spec": {
                "holderIdentity": "one",
                "leaseDurationSeconds": 15,
                "acquireTime": "2030-01-01T00:00:00.010000Z",
                "renewTime": "2030-01-01T00:00:00.010000Z",
                "leaseTransitions": 0,
            },
        }
        await first.stop()

    run(main())


def test_a_second_candidate_waits_for_as_long_as_the_first_renews() -> None:
    async def main() -> None:
        lease = FakeLease()
        first, second = Candidate(lease, "one"), Candidate(lease, "two", seed=1)
        await asyncio.sleep(600)
        assert [first.leading, second.leading] == [True, False]
        assert [first.led, second.led] == [[], []]
        assert lease.num_writes == pytest.approx(600 / RETRY, rel=0.02)
        assert spec(lease)["acquireTime"] == "2030-01-01T00:00:00.010000Z"
        assert spec(lease)["renewTime"] > "2030-01-01T00:09:55"
        await first.stop()
        await second.stop()

    run(main())


@pytest.mark.parametrize("seed", range(20))
def test_after_a_sudden_death_the_other_leads_within_the_lease_and_five_seconds(seed: int) -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await settle()
        second = Candidate(lease, "two", seed=seed)
        await asyncio.sleep(60 + seed / 10)
        await kill(first)
        assert await until(lambda: second.leading) <= LEASE + 5
        assert spec(lease)["leaseTransitions"] == 1
        await second.stop()

    run(main())


@pytest.mark.parametrize("seed", range(20))
def test_after_an_orderly_end_the_other_leads_within_two_seconds(seed: int) -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await settle()
        second = Candidate(lease, "two", seed=seed)
        await asyncio.sleep(60 + seed / 10)
        await first.stop()
        assert (spec(lease)["holderIdentity"], spec(lease)["leaseDurationSeconds"]) == ("", 1)
        assert not first.elector.is_leader
        assert await until(lambda: second.leading) < 2
        await second.stop()

    run(main())


def test_the_lease_is_kept_while_the_led_task_winds_down() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await settle()
        second = Candidate(lease, "two")
        first.wind_down_seconds = 40
        await asyncio.sleep(10)
        stopping = asyncio.create_task(first.stop())
        await asyncio.sleep(39)
        assert first.elector.is_leader
        assert not second.leading
        await stopping
        assert await until(lambda: second.leading) < 2
        await second.stop()

    run(main())


def test_errors_that_pass_within_the_deadline_are_survived() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(5)
        for fault in (Unreachable("refused"), ApiError(500, "InternalError", "etcd")):
            first.fault = fault
            await asyncio.sleep(RENEW - 2 * RETRY - 0.1)
            first.fault = None
            await asyncio.sleep(30)
        assert first.leading
        assert first.led == []
        await first.stop()

    run(main())


def test_one_request_that_hangs_leaves_time_for_another() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        first.hangs = True
        await asyncio.sleep(5)
        first.hangs = False
        await asyncio.sleep(60)
        assert first.led == []
        await first.stop()

    run(main())


def test_a_lease_that_cannot_be_renewed_is_lost_at_the_deadline_and_the_led_task_is_ended() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        first.fault = Unreachable("refused")
        lost_after = await until(lambda: not first.elector.is_leader)
        assert lost_after <= RENEW
        await settle()
        assert not first.leading
        first.fault = None
        await until(lambda: first.leading, RETRY)
        assert spec(lease)["leaseTransitions"] == 0
        await first.stop()

    run(main())


def test_the_right_to_lead_is_counted_from_the_sending_of_a_renewal_not_from_its_answer() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        first.answer_seconds = 4
        await until(lambda: lease.num_writes == 2)
        sent_at = now() - 2
        first.fault = Unreachable("refused")
        await until(lambda: not first.elector.is_leader)
        assert now() - sent_at == pytest.approx(RENEW, abs=0.1)
        await first.stop()

    run(main())


def test_the_right_to_lead_ends_in_time_even_if_the_led_task_does_not() -> None:
    async def main() -> None:
        lease = FakeLease()
        first, second = Candidate(lease, "one"), Candidate(lease, "two")
        await asyncio.sleep(1)
        first, second = (first, second) if first.leading else (second, first)
        first.wind_down_seconds = 1000
        first.fault = Unreachable("refused")
        await until(lambda: second.leading)
        assert first.leading
        assert not first.elector.is_leader
        assert second.elector.is_leader
        await second.stop()
        await first.stop()

    run(main())


def test_a_lease_that_another_has_taken_is_lost_at_the_next_renewal() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        thief = lease.read()
        assert thief is not None
        thief["spec"]["holderIdentity"] = "two"
        lease.write(thief, new=False)
        await asyncio.sleep(RETRY + 0.1)
        assert not first.leading
        assert spec(lease)["holderIdentity"] == "two"
        await first.stop()
        assert spec(lease)["holderIdentity"] == "two"

    run(main())


def test_a_write_by_somebody_else_does_not_cost_the_lead() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        labelled = lease.read()
        assert labelled is not None
        labelled["metadata"]["labels"] = {"team": "a"}
        lease.write(labelled, new=False)
        await asyncio.sleep(60)
        assert first.led == []
        assert lease.document is not None
        assert lease.document["metadata"]["labels"] == {"team": "a"}
        await first.stop()

    run(main())


def test_a_lease_of_a_dead_stranger_with_a_clock_of_its_own_runs_out_by_our_clock() -> None:
    async def main() -> None:
        lease = FakeLease()
        document = {
            "metadata": {"name": "operator", "namespace": "system"},
            "spec": {"holderIdentity": "ghost", "leaseDurationSeconds": 40, "renewTime": "2099-01-01T00:00:00.000000Z"},
        }
        lease.write(document, new=True)
        first = Candidate(lease, "one")
        assert await until(lambda: first.leading) == pytest.approx(40, abs=0.1)
        await first.stop()

    run(main())


@pytest.mark.parametrize("spec", [None, {}, {"holderIdentity": None}, {"holderIdentity": "", "leaseTransitions": 3}])
def test_an_empty_lease_is_free(spec: Document | None) -> None:
    async def main() -> None:
        lease = FakeLease()
        lease.write({"metadata": {"name": "operator", "namespace": "system"}, "spec": spec}, new=True)
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        assert first.leading
        assert lease.document is not None
        assert lease.document["spec"]["leaseTransitions"] == ((spec or {}).get("leaseTransitions") or 0) + 1
        await first.stop()

    run(main())


def test_a_led_task_that_ends_gives_the_lease_back_and_ends_the_run() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        first.ends.set_result(None)
        await first.task
        assert spec(lease)["holderIdentity"] == ""

    run(main())


def test_a_led_task_that_fails_gives_the_lease_back_and_its_error_is_raised() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        first.ends.set_exception(ValueError("a bug"))
        with pytest.raises(ValueError, match="a bug"):
            await first.task
        assert spec(lease)["holderIdentity"] == ""

    run(main())


def test_stopping_a_candidate_that_does_not_lead_leaves_the_lease_alone() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        second = Candidate(lease, "two")
        await asyncio.sleep(1)
        await second.stop()
        assert spec(lease)["holderIdentity"] == "one"
        await first.stop()

    run(main())


def test_stopping_while_the_server_is_away_ends_all_the_same() -> None:
    async def main() -> None:
        lease = FakeLease()
        first = Candidate(lease, "one")
        await asyncio.sleep(1)
        first.hangs = True
        begun_at = now()
        await first.stop()
        assert now() - begun_at <= RENEW

    run(main())


def test_who_leads_is_measured() -> None:
    async def main() -> None:
        metrics = Metrics()

        def value() -> float | None:
            return metrics.registry.get_sample_value("leader_election_master_status", {"name": "operator"})

        lease = FakeLease()
        first = Candidate(lease, "one", metrics=metrics)
        assert value() == 0
        await asyncio.sleep(1)
        assert value() == 1
        await first.stop()
        assert value() == 0

    run(main())


@pytest.mark.parametrize(("renew", "retry"), [(15, 2), (10, 10), (10, 0)])
def test_times_that_cannot_work_are_refused(renew: float, retry: float) -> None:
    with pytest.raises(ValueError, match="each must be larger than the one before"):
        LeaderElector(
            FakeLease().client(lambda act: asyncio.sleep(0, act())), "operator", "system", "one", 15, renew, retry
        )


_REQUEST = st.tuples(
    st.sampled_from(["answered", "answered", "refused", "lost on the way there", "lost on the way back"]),
    st.floats(0, 20),
    st.floats(0, 20),
)
_WEATHER = st.lists(st.tuples(st.floats(0, 20), st.lists(_REQUEST, max_size=8)), max_size=3)


@settings(max_examples=60)
@given(_WEATHER, _WEATHER, st.integers(0, 3), st.lists(st.floats(0, 100), max_size=3))
def test_two_candidates_never_lead_at_once(weather_one: Any, weather_two: Any, seed: int, stops: list[float]) -> None:
    async def main() -> None:
        lease = FakeLease()
        leading: set[str] = set()
        overlaps: list[tuple[float, set[str]]] = []

        def candidate(name: str, weather: list[tuple[float, list[Any]]]) -> asyncio.Task[None]:
            requests = _requests(weather)

            async def around(act: Act) -> Document | None:
                fate, there, back = next(requests, _FINE)
                if fate == "fine":
                    await asyncio.sleep(0.01)
                    return act()
                if fate == "refused":
                    raise ApiError(500, "InternalError", "etcd")
                # What was sent arrives even when the sender has long stopped waiting for it.
                arriving = asyncio.ensure_future(_arrive(act, there, fate))
                try:
                    answer = await asyncio.shield(arriving)
                finally:
                    arriving.add_done_callback(lambda task: task.cancelled() or task.exception())
                await asyncio.sleep(back if fate != "lost on the way back" else 1e6)
                return answer

            async def lead() -> None:
                leading.add(name)
                if len(leading) > 1:
                    overlaps.append((now(), set(leading)))
                try:
                    await asyncio.Event().wait()
                finally:
                    leading.discard(name)

            elector = LeaderElector(
                lease.client(around), "operator", "system", name, rng=random.Random(seed), metrics=_METRICS
            )
            return asyncio.create_task(elector.run(lead))

        tasks = [candidate("one", weather_one), candidate("two", weather_two)]
        for number, pause in enumerate(stops):
            await asyncio.sleep(pause)
            which = number % 2
            tasks[which].cancel()
            await asyncio.wait((tasks[which],))
            tasks[which] = candidate(f"{number}", [])
        await asyncio.sleep(200)
        assert overlaps == []
        await until(lambda: len(leading) == 1)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for late in asyncio.all_tasks() - {asyncio.current_task()}:
            late.cancel()

    run(main())


_METRICS = Metrics()
_FINE = ("fine", 0.0, 0.0)


def _requests(weather: list[tuple[float, list[Any]]]) -> Any:
    """The fates of requests: a stretch of good weather between any two storms."""
    for calm, storm in weather:
        ends_at = now() + calm
        while now() < ends_at:
            yield _FINE
        yield from storm


async def _arrive(act: Act, seconds: float, fate: str) -> Document | None:
    await asyncio.sleep(seconds if fate != "lost on the way there" else 1e6)
    return act()
