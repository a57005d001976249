"""Which keys want a worker, in which order, and not before when.

`handlers` adds keys as changes are seen; `controller` takes them. A key is named at most once however often it is
added, and no two workers have the same key: one that is added while a worker has it comes again after `done`.

A key has one next turn. Adding it for an earlier time moves the turn forward, adding it for a later one changes
nothing: who has just looked at an object says anew when to look again, so an older wish is out of date by then.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from finetune_operator.metrics import Metrics
from finetune_operator.runtime.limits import TokenBucket, exponential

__all__ = ["CHANGED", "RESYNC", "ShutDown", "WorkQueue"]

CHANGED = 0
"""Priority of what is new or has changed."""
RESYNC = -100
"""Priority of what is looked at once more after a start, and can wait for what has changed."""

_FIRST_DELAY = 0.005
_LONGEST_DELAY = 1000.0
_RETRIES_PER_SECOND = 10.0
_RETRIES_AT_ONCE = 100
_FEW = 64  # heap entries not worth a clean-up

K = TypeVar("K", bound=Hashable)


class ShutDown(Exception):
    """The queue is shut and empty."""


@dataclass(slots=True)
class _Turn:
    """The next turn of a key. `entry` is the number of its one valid heap entry; earlier ones are skipped."""

    at: float
    priority: int
    delayed: bool = False
    entry: int = 0


class WorkQueue(Generic[K]):
    """A queue for the tasks of one event loop. Adding and taking cost O(log n)."""

    def __init__(self, name: str, *, metrics: Metrics | None = None, bucket: TokenBucket | None = None) -> None:
        """`bucket` bounds the rate of all retries together; by default 10 a second after 100 at once."""
        self._turns: dict[K, _Turn] = {}
        self._in_work: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._ready: list[tuple[int, int, K]] = []
        self._later: list[tuple[float, int, K]] = []
        self._num_delayed = 0
        self._num_entries = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._bucket = bucket or TokenBucket(_RETRIES_PER_SECOND, _RETRIES_AT_ONCE)
        self._shut = False
        self._count(name, metrics or Metrics())

    def __len__(self) -> int:
        """Keys that would be handed out now; delayed ones not among them."""
        return len(self._turns) - self._num_delayed

    def add(self, key: K, priority: int = CHANGED) -> None:
        """The key wants a worker now. The higher priority comes first, then who was there first."""
        self._want(key, 0.0, priority)

    def add_after(self, key: K, seconds: float, priority: int = CHANGED) -> None:
        """The key wants a worker in so many seconds, unless it has an earlier turn."""
        self._want(key, seconds, priority)

    def add_rate_limited(self, key: K, priority: int = CHANGED, at_least: float = 0.0) -> None:
        """The key is tried again: after 5 ms, twice as long at each failure, or `at_least` seconds if that is more."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        self._retries.inc()
        delay = exponential(failures, _FIRST_DELAY, _LONGEST_DELAY)
        self._want(key, max(delay, self._bucket.reserve(self._now()), at_least), priority)

    def forget(self, key: K) -> None:
        """The key has succeeded: its next failure counts as the first."""
        self._failures.pop(key, None)

    def num_requeues(self, key: K) -> int:
        """How often in a row the key was added after a failure."""
        return self._failures.get(key, 0)

    async def get(self) -> K:
        """The next key, for the caller alone until `done`. ShutDown once the queue is shut and nothing is ready."""
        while not self._is_ready():
            if self._shut:
                raise ShutDown
            await self._wait()
        return self._take()

    def done(self, key: K) -> None:
        """The worker has finished with the key, however it went."""
        self._worked.observe(self._now() - self._in_work.pop(key))
        turn = self._turns.get(key)
        if turn is not None and not turn.delayed:
            self._queue(key, turn)

    def shut_down(self) -> None:
        """Nothing more is added, and delayed keys are dropped; what is ready is still handed out."""
        self._shut = True
        self._turns = {key: turn for key, turn in self._turns.items() if not turn.delayed}
        self._later.clear()
        self._num_delayed = 0
        self._set_timer()
        while self._waiters:
            self._wake_one()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _want(self, key: K, seconds: float, priority: int) -> None:
        if self._shut:
            return
        now = self._now()
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = _Turn(now + max(0.0, seconds), priority)
            is_ready = seconds <= 0
        else:
            sooner, higher = now + seconds < turn.at, priority > turn.priority
            if not sooner and not higher:
                return
            turn.at = min(turn.at, now + max(0.0, seconds))
            turn.priority = max(turn.priority, priority)
            is_ready = not turn.delayed or turn.at <= now
        if is_ready:
            self._make_ready(key, turn, is_new=turn.entry == 0 or turn.delayed)
        else:
            self._delay(key, turn)

    def _delay(self, key: K, turn: _Turn) -> None:
        self._num_delayed += not turn.delayed
        turn.delayed = True
        turn.entry = self._next_entry()
        heapq.heappush(self._later, (turn.at, turn.entry, key))
        if len(self._later) > 2 * self._num_delayed + _FEW:
            # Entries of turns that came early. Jobs that look hours ahead at each change would pile them up.
            self._later = [(turn.at, turn.entry, key) for key, turn in self._turns.items() if turn.delayed]
            heapq.heapify(self._later)
        self._set_timer()

    def _make_ready(self, key: K, turn: _Turn, is_new: bool) -> None:
        self._num_delayed -= turn.delayed
        turn.delayed = False
        turn.entry = self._next_entry()
        self._adds.inc(is_new)
        if key not in self._in_work:
            self._queue(key, turn)

    def _queue(self, key: K, turn: _Turn) -> None:
        heapq.heappush(self._ready, (-turn.priority, turn.entry, key))
        self._wake_one()

    def _next_entry(self) -> int:
        self._num_entries += 1
        return self._num_entries

    def _set_timer(self) -> None:
        at = self._later[0][0] if self._later else None
        if self._timer is not None:
            if at is not None and self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._come_due) if at is not None else None

    def _come_due(self) -> None:
        self._timer = None
        now = self._now()
        while self._later and self._later[0][0] <= now:
            _, entry, key = heapq.heappop(self._later)
            turn = self._turns.get(key)
            if turn is not None and turn.entry == entry:
                self._make_ready(key, turn, is_new=True)
        self._set_timer()

    def _is_ready(self) -> bool:
        """Whether there is a key to take; drops what is out of date from the head of the heap."""
        while self._ready:
            _, entry, key = self._ready[0]
            turn = self._turns.get(key)
            if turn is not None and turn.entry == entry:
                return True
            heapq.heappop(self._ready)
        return False

    def _take(self) -> K:
        key = heapq.heappop(self._ready)[2]
        now = self._now()
        self._waited.observe(now - self._turns.pop(key).at)
        self._in_work[key] = now
        return key

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake_one()  # the key that this one was woken for is another's
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _count(self, name: str, metrics: Metrics) -> None:
        self._adds = metrics.queue_adds.labels(name, name)
        self._retries = metrics.queue_retries.labels(name, name)
        self._waited = metrics.queue_waited.labels(name, name)
        self._worked = metrics.queue_worked.labels(name, name)
        metrics.queue_depth.labels(name, name).set_function(lambda: len(self))
        metrics.queue_unfinished.labels(name, name).set_function(lambda: sum(self._working_for()))
        metrics.queue_longest.labels(name, name).set_function(lambda: max(self._working_for(), default=0.0))

    def _working_for(self) -> list[float]:
        return [self._now() - since for since in self._in_work.values()]
