"""Jobs for people: aligned columns without borders, whole at any width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from finetune_api.progress import Artifact
from finetune_client.advice import advice_for
from finetune_client.cli.sizes import size
from finetune_client.telling import first_words
from finetune_client.views import JobView

__all__ = ["age", "artifact_table", "columns", "job_table"]

_HEADER = ("NAME", "METHOD", "TUNING", "GPUS", "PHASE", "STEP", "CKPT", "RESTARTS", "AGE", "WHY")
_RIGHT = frozenset({"GPUS", "STEP", "CKPT", "RESTARTS", "AGE"})


def job_table(views: Sequence[JobView], now: datetime, with_namespace: bool = False) -> Iterator[str]:
    """A row for each job; WHY is the first words of what it waits for or failed of."""
    header = ("NAMESPACE", *_HEADER) if with_namespace else _HEADER
    rows = [(view.namespace, *_row(view, now)) if with_namespace else _row(view, now) for view in views]
    return columns(header, rows)


def artifact_table(artifacts: Sequence[Artifact]) -> Iterator[str]:
    """A row for each model."""
    rows = [(one.kind, size(one.bytes), one.digest, one.uri) for one in artifacts]
    return columns(("KIND", "SIZE", "DIGEST", "URI"), rows)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with every column as wide as its longest entry."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    for row in [header, *rows]:
        cells = [
            text.rjust(width) if name in _RIGHT else text.ljust(width)
            for text, width, name in zip(row, widths, header, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def age(since: datetime | None, now: datetime) -> str:
    """45s, 12m, 7h or 3d; empty where nobody knows."""
    if since is None:
        return ""
    seconds = max(0, int((now - since).total_seconds()))
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _row(view: JobView, now: datetime) -> tuple[str, ...]:
    status = view.status
    step = ""
    if status.progress is not None:
        of = f"/{status.progress.total_steps}" if status.progress.total_steps else ""
        step = f"{status.progress.step}{of}"
    return (
        view.name,
        status.method or "",
        status.tuning or "",
        "" if status.resolved is None else str(status.resolved.gpus),
        str(view.phase),
        step,
        "" if status.checkpoint is None else str(status.checkpoint.step),
        str(status.restarts),
        age(view.created_at, now),
        first_words(advice_for(view).why),
    )
