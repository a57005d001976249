"""Workers that take keys from a queue and bring each to what it should be, one pass at a time.

`handlers` makes one over the work queue that its reflectors fill. A pass that fails is counted, logged once and tried
again later; nothing that a pass does ends a worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from finetune_operator.errors import ApiError, ClusterError, Conflict
from finetune_operator.kinds import Key
from finetune_operator.metrics import Metrics
from finetune_operator.runtime.workqueue import ShutDown, WorkQueue

__all__ = ["Controller", "Reconcile"]

Reconcile = Callable[[Key], Awaitable[float | None]]
"""One pass over one object. Returns in how many seconds to look again, None for when it changes."""

_log = logging.getLogger(__name__)


class Controller:
    """Runs passes with a fixed number of workers."""

    def __init__(
        self,
        name: str,
        queue: WorkQueue[Key],
        reconcile: Reconcile,
        num_workers: int = 10,
        metrics: Metrics | None = None,
        *,
        pass_seconds: float = 120,
    ) -> None:
        """`pass_seconds` bounds a pass: one that waits for ever would keep its worker from all other keys."""
        self._name = name
        self._queue = queue
        self._reconcile = reconcile
        self._num_workers = num_workers
        self._pass_seconds = pass_seconds
        self._metrics = metrics or Metrics()
        self._metrics.max_workers.labels(name).set(num_workers)
        self._active = self._metrics.active_workers.labels(name)
        self._seconds = self._metrics.reconcile_seconds.labels(name)
        self._errors = self._metrics.reconcile_errors.labels(name)
        self._timeouts = self._metrics.reconcile_timeouts.labels(name)

    async def run(self) -> None:
        """Works until the queue is shut and drained. When cancelled, passes under way are cut off and awaited."""
        async with asyncio.TaskGroup() as workers:
            for number in range(self._num_workers):
                workers.create_task(self._work(), name=f"{self._name}-{number}")

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                key = await self._queue.get()
            except ShutDown:
                return
            begun_at = loop.time()
            try:
                with self._active.track_inprogress():
                    await self._pass(key)
            finally:
                self._seconds.observe(loop.time() - begun_at)
                self._queue.done(key)

    async def _pass(self, key: Key) -> None:
        limit = asyncio.timeout(self._pass_seconds)
        try:
            async with limit:
                look_again = await self._reconcile(key)
        except asyncio.CancelledError:
            if _this_task_is_cancelled():
                raise
            self._failed(key, RuntimeError("something that the pass waited for was cancelled"))
        except TimeoutError as error:
            self._failed(key, self._cut_off() if limit.expired() else error)
        except Exception as error:
            self._failed(key, error)
        else:
            self._succeeded(key, look_again)

    def _succeeded(self, key: Key, look_again: float | None) -> None:
        self._queue.forget(key)
        if look_again is not None:
            self._queue.add_after(key, look_again)
        self._count("success" if look_again is None else "requeue_after")

    def _failed(self, key: Key, error: Exception) -> None:
        wait = error.retry_after if isinstance(error, ApiError) else None
        self._queue.add_rate_limited(key, at_least=wait or 0.0)
        self._errors.inc()
        self._count("error")
        # A conflict only says that what we read was a moment old. A bug of ours is worth its traceback.
        level = logging.INFO if isinstance(error, Conflict) else logging.WARNING
        level = level if isinstance(error, ClusterError) else logging.ERROR
        _log.log(
            level,
            "%s %s/%s failed for the %d. time in a row: %s",
            *(self._name, *key, self._queue.num_requeues(key), str(error) or type(error).__name__),
            exc_info=None if isinstance(error, ClusterError) else error,
            extra={"namespace": key.namespace, "job": key.name},
        )

    def _cut_off(self) -> TimeoutError:
        self._timeouts.inc()
        return TimeoutError(f"the pass was cut off after {self._pass_seconds:.0f} s")

    def _count(self, result: str) -> None:
        self._metrics.reconciles.labels(self._name, result).inc()


def _this_task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
