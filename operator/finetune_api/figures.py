"""The figures of a step as a line of the trainers' log: rank 0 writes it, the client reads it.

    step 20: {"loss": 1.84, "learning_rate": 0.0002}

The log is the one thing that comes back step by step from everywhere a job may run. Six digits of each figure do for a
curve; metrics.jsonl in the run's folder has all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

__all__ = ["figures_in", "line_of"]

_LINE = re.compile(r" step (\d+): (\{.*\})$")
_DIGITS = 6


def line_of(step: int, figures: Mapping[str, float]) -> str:
    """For the log, which puts its own time and name before it."""
    return f"step {step}: {json.dumps({name: float(f'{value:.{_DIGITS}g}') for name, value in figures.items()})}"


def figures_in(line: str) -> tuple[int, dict[str, float]] | None:
    """The step and its figures, where the line of a log holds some; what a model or a library prints does not."""
    found = _LINE.search(line)
    if found is None:
        return None
    try:
        figures = json.loads(found[2], parse_int=float)
    except ValueError:
        return None
    return (int(found[1]), figures) if all(isinstance(value, float) for value in figures.values()) else None
