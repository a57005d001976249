"""Jobs for people: aligned columns without borders, whole at any width, and a line for each change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from finetune_api.progress import Artifact
from finetune_client.advice import advice_for
from finetune_client.cli.display import duration
from finetune_client.cli.sizes import size
from finetune_client.views import JobView

__all__ = ["age", "artifact_table", "change", "columns", "job_table"]

_HEADER = ("NAME", "METHOD", "TUNING", "GPUS", "PHASE", "STEP", "CKPT", "RESTARTS", "AGE", "WHY")
_RIGHT = frozenset({"GPUS", "STEP", "CKPT", "RESTARTS", "AGE"})
_WHY_LENGTH = 70


def job_table(views: Sequence[JobView], now: datetime, with_namespace: bool = False) -> Iterator[str]:
    """A row for each job; WHY is the first words of what it waits for or failed of."""
    header = ("NAMESPACE", *_HEADER) if with_namespace else _HEADER
    rows = [(view.namespace, *_row(view, now)) if with_namespace else _row(view, now) for view in views]
    return columns(header, rows)


def artifact_table(artifacts: Sequence[Artifact]) -> Iterator[str]:
    """A row for each model."""
    rows = [(one.kind, size(one.bytes), one.digest, one.uri) for one in artifacts]
    return columns(("KIND", "SIZE", "DIGEST", "URI"), rows)


def change(view: JobView) -> str:
    """How the job stands, in a line that differs when something worth telling has changed."""
    status = view.status
    parts = [str(view.phase)]
    if status.progress is not None and status.progress.step:
        of = f"/{status.progress.total_steps}" if status.progress.total_steps else ""
        parts.append(f"step {status.progress.step}{of}")
        if "loss" in status.progress.metrics:
            parts.append(f"loss {status.progress.metrics['loss']}")
        if status.progress.eta_seconds and not view.is_over:
            parts.append(f"{duration(status.progress.eta_seconds)} left")
    if status.checkpoint is not None:
        parts.append(f"checkpoint {status.checkpoint.step}")
    if len(status.attempts) > 1:
        parts.append(f"attempt {status.attempts[-1].number}")
    why = advice_for(view).why
    return ", ".join(parts) + (f": {_first_line(why)}" if why else "")


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
        _first_line(advice_for(view).why),
    )


def _first_line(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= _WHY_LENGTH else line[: _WHY_LENGTH - 1] + "…"
