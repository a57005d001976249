"""When a run saves what it would need to go on, and whether the next attempt does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract

__all__ = ["Checkpoint"]


class Checkpoint(Contract):
    """Weights, optimizer state and position in the data, saved so that the next attempt goes on where this one was."""

    every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two checkpoints. Left out: one is made only when the run is asked to stop."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 3
    """Checkpoints that are kept; older ones are deleted once a newer one is whole."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the job's newest whole checkpoint; `never` begins at step 0."""
