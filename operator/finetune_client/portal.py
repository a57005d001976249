"""An event loop on a thread of its own, for those who call coroutines from code that has none, or has one already.

Used by `client.Client`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Portal"]

T = TypeVar("T")


class Portal:
    """Runs coroutines elsewhere and waits for them here. The thread starts with the first one."""

    def __init__(self) -> None:
        self.is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns or raises. One that is interrupted here is cancelled there."""
        try:
            loop = self._running()
        except RuntimeError:
            coroutine.close()  # or Python warns, whenever it is collected, that nobody has awaited it
            raise
        return _result(asyncio.run_coroutine_threadsafe(coroutine, loop))

    def iterate(self, source: AsyncIterator[T]) -> Generator[T]:
        """The items of `source` as they come. Leaving early ends it."""
        try:
            while True:
                try:
                    item = self.call(_next(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            close = getattr(source, "aclose", None)
            if close is not None and not self.is_closed:
                self.call(close())

    def close(self) -> None:
        """End the thread; what still runs there is cancelled."""
        self.is_closed = True
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self.is_closed:
            raise RuntimeError("the client is closed; make another one")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # A daemon: a program that ends without closing its client is not held up.
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="finetune client", daemon=True)
            self._thread.start()
        return self._loop


async def _next(source: AsyncIterator[T]) -> T:
    return await anext(source)


def _result(future: Future[T]) -> T:
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.run_until_complete(_end_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _end_tasks() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
