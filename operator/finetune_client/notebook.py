"""How a job looks in a notebook: what Jupyter shows of a `JobView`, and of a `Moment` with the curves of its loss,
or of its reward.

Plain HTML and SVG without scripts, so that it is also shown where a notebook is not trusted, or is read on the web.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from finetune_client.telling import summary, watched, what_next
from finetune_client.views import JobView

__all__ = ["html_of"]

_WIDTH, _HEIGHT, _MARGIN = 480, 90, 4


def html_of(view: JobView, metrics: Sequence[Mapping[str, float]] = ()) -> str:
    """The job's line, how far it is, what to do next, and the figures that people watch."""
    names = {name for row in metrics for name in row}
    lines = [
        f"<b>{escape(view.name)}</b> in {escape(view.namespace)}: {escape(summary(view))}",
        _bar(view),
        escape(what_next(view)),
        *(
            _curve(said, [(row["step"], row[name]) for row in metrics if name in row])
            for name, said in watched(names).items()
        ),
    ]
    return "".join(f"<div>{line}</div>" for line in lines if line)


def _bar(view: JobView) -> str:
    progress = view.status.progress
    if progress is None or not progress.total_steps:
        return ""
    return f'<progress style="width: {_WIDTH}px" max="{progress.total_steps}" value="{progress.step}"></progress>'


def _curve(said: str, points: Sequence[tuple[float, float]]) -> str:
    """A line through the points, in a box that they fill."""
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 2:
        return ""
    xs, ys = zip(*points, strict=True)
    across, down = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    places = " ".join(
        f"{_MARGIN + across * _part(x, xs):.1f},{_MARGIN + down * (1 - _part(y, ys)):.1f}" for x, y in points
    )
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}"><polyline points="{places}" fill="none" stroke="steelblue" '
        f'stroke-width="1.5"/></svg><br/>{said} {ys[0]:.4g} → {ys[-1]:.4g}'
    )


def _part(value: float, values: Sequence[float]) -> float:
    """Where the value is between the least and the greatest: 0 to 1."""
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5
