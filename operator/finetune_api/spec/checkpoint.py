"""When a run saves what it would need to go on, what of that it keeps, and whether the next attempt goes on from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract
from finetune_api.spec.fields import EverySteps, Memory

__all__ = ["Checkpoint", "KeepBest"]


class KeepBest(Contract):
    """Keep the checkpoints at which a figure was best."""

    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
    """Name of a logged figure, such as eval_loss. Its last value before the checkpoint counts."""
    mode: Literal["min", "max"] = "min"
    """Whether less of it is better, or more."""
    count: Annotated[int, Field(ge=1, le=100)] = 1
    """Checkpoints that are kept for it."""


class Checkpoint(Contract):
    """Weights, optimizer state and position in the data, saved so that the next attempt goes on where this one was."""

    every_steps: EverySteps = "auto"
    """Optimizer steps between two checkpoints, or `auto`: so that saving takes no more than a hundredth of the
    time, 1 to 30 minutes apart. One is also made when the run is asked to stop."""
    when_behind: Literal["skip", "wait"] = "skip"
    """When one is due while two earlier ones are still being written: `skip` leaves it out, `wait` stops training
    until there is room."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 3
    """Checkpoints that are kept; older ones are deleted once a newer one is whole."""
    keep_every: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Keep also those whose step is a multiple of this."""
    keep_best: KeepBest | None = None
    """Keep also those at which a figure was best."""
    quota: Memory | None = None
    """Most that those that are kept may take together, such as 500Gi. The oldest of keepEvery go first, then of
    keepLast, then of keepBest; never the newest whole one, nor a pinned one. The next one needs room beside it."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the job's newest whole checkpoint; `never` begins at step 0."""
