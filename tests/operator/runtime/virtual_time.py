"""An asyncio event loop that does not wait: when every task waits for a timer, its clock jumps to the next one.

Tests of the runtime run in it. Hours pass in milliseconds, and a schedule comes out the same each time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

__all__ = ["Stuck", "VirtualTimeLoop", "run", "settle"]

_PATIENCE_SECONDS = 30.0
_ON_ITS_WAY_SECONDS = 0.2
_T = TypeVar("_T")


class Stuck(Exception):
    """Every task waits for another, and no timer is set."""


class _Selector(selectors.BaseSelector):
    """Hardly waits for sockets; what would have been waited is added to the clock instead."""

    def __init__(self, passes: Callable[[float], None]) -> None:
        self._real = selectors.DefaultSelector()
        self._passes = passes

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # The loop's own pipe is always there, and a listener may be. With any other socket, what was just sent may
        # still be on its way: a loaded machine takes a while to bring it, and minutes would pass meanwhile.
        has_connections = len(self._real.get_map()) > 2
        events = self._real.select(_PATIENCE_SECONDS if timeout is None else _ON_ITS_WAY_SECONDS * has_connections)
        if not events and timeout is None:
            raise Stuck("every task waits, and nothing will ever wake one")
        if not events and timeout is not None:
            self._passes(timeout)
        return events

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Starts at zero. `time()` moves only when there is nothing else to do."""

    def __init__(self) -> None:
        self._clock = 0.0
        super().__init__(_Selector(self._pass))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._clock

    def _pass(self, seconds: float) -> None:
        self._clock += max(0.0, seconds)


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


async def settle() -> None:
    """Lets every task go on until it waits, while (almost) no time passes."""
    await asyncio.sleep(1e-6)
