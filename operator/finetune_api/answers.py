"""What a process of the trainers' tells the command that has asked it something: a line of JSON each.

`finetune ckpt` and `finetune data` ask; how far the answer has come is told while it is made.
"""

from __future__ import annotations

from pydantic import Field, JsonValue

from finetune_api.base import Contract
from finetune_api.failures import Problem

__all__ = ["Refusal", "Step", "Told"]


class Step(Contract):
    """How far something that takes time has come."""

    what: str
    done: int
    """Rows, or bytes where the work is reading them."""
    total: int


class Refusal(Contract):
    """Why there is no report."""

    message: str
    known: list[str] = Field(default_factory=list)
    """Checkpoints that there are, where another one was asked for."""
    problems: list[Problem] = Field(default_factory=list)
    """What is wrong with which row, where several are."""
    exit_code: int


class Told(Contract):
    """One line: exactly one of them is set."""

    progress: Step | None = None
    report: dict[str, JsonValue] | None = None
    refusal: Refusal | None = None
