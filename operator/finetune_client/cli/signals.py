"""Ctrl-C and its kin while a run goes on. Used by `finetune run`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["counting_signals"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def counting_signals() -> Iterator[Callable[[], int]]:
    """Within, Ctrl-C, SIGTERM and SIGHUP are counted and not obeyed. Yields what tells the count.

    Printing or killing inside a handler could meet a half-done print; the run's own loop does both.
    """
    count = 0

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1

    # nohup ignores SIGHUP, and means it.
    numbers = [
        number for number in _STOP_SIGNALS if number is signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
