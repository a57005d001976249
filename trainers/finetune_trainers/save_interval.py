"""When the next checkpoint is due. Rank 0 asks before the end of every step; `saving` tells the other ranks.

With a number of steps, at its multiples, or at the end of the iteration that they lie in. With `auto`, by what saving
was seen to cost: so far apart that training stands still for no more than the plan allows, and that one is written
before the next begins. Time is passed in.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.plan import CheckpointPlan

__all__ = ["SaveInterval"]

_ROOM = 1.25
"""Times what writing one takes: a storage that is a little slower the next time is no reason to skip one."""


class SaveInterval:
    """Of one attempt."""

    def __init__(self, settings: CheckpointPlan, clock: Callable[[], float], iteration: int = 1) -> None:
        """`iteration`: optimizer steps after which the training can be left; one is due after none in between."""
        self._every_steps, self._auto, self._clock = settings.every_steps, settings.interval, clock
        self._iteration = iteration
        self._saved_at = clock()
        self._blocked_seconds = 0.0
        self._flush_seconds = 0.0

    def is_due(self, step: int) -> bool:
        """After `step` optimizer steps?"""
        if step % self._iteration:
            return False
        if self._every_steps is not None:
            return step // self._every_steps > (step - self._iteration) // self._every_steps
        return self._auto is not None and self._clock() - self._saved_at >= self.seconds

    @property
    def seconds(self) -> float:
        """Between two checkpoints, when the run decides."""
        assert self._auto is not None
        wanted = max(self._blocked_seconds / self._auto.max_overhead, self._auto.min_seconds)
        return max(min(wanted, self._auto.max_seconds), _ROOM * self._flush_seconds)

    def saved(self, blocked_seconds: float) -> None:
        """A checkpoint was staged just now; training stood still for so long."""
        self._saved_at, self._blocked_seconds = self._clock(), blocked_seconds

    def flushed(self, seconds: float) -> None:
        """It took so long until it was whole."""
        self._flush_seconds = seconds
