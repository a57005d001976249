"""Progress reports on their way out: JSON lines in the run's folder, which the CLI follows, and the job's ConfigMap.

The driver writes the stages before and after training, rank 0 writes those between; never both at the same time. What
is said after training, or of a part of a step, includes how far that has come: whoever follows the run may see only the
last report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from finetune_api.progress import Outcome, Progress, Stage
from finetune_trainers.cluster_sink import cluster_sink

__all__ = ["PROGRESS_FILE", "FileSink", "Sink", "last_report"]

PROGRESS_FILE = "progress.jsonl"
"""In the run's folder."""
MIN_INTERVAL_SECONDS = 0.2
_AFTER_TRAINING = frozenset({Stage.EXPORTING, Stage.DONE})
_OF_STEPS = frozenset({Stage.TRAINING, Stage.EVALUATING})
_LASTING = frozenset(Progress.model_fields) - {
    *("stage", "percent", "eta_seconds"),
    *("message", "phase", "role", "updated_at"),
}
"""Of a report, what still holds when training is over."""
_LONGEST_LINE = 1 << 16


class Sink(Protocol):
    """Whatever takes progress reports."""

    def report(self, stage: Stage, **figures: Any) -> None: ...


class FileSink:
    """Appends Progress objects to a file, one per line and at most five per second.

    A report that comes too soon is left out unless its stage is new or it is `urgent`: the last step and every
    evaluation must be seen. Each line is one write, so that a reader never sees half of another writer's line.
    In a pod of the operator's, what is written to the file is reported to the cluster too.
    """

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.monotonic, on_stop: Callable[[], None] = lambda: None
    ) -> None:
        """`on_stop` is called when the operator asks the run to stop; it is asked of rank 0."""
        self._path = path
        self._cluster = cluster_sink(on_stop=on_stop)
        self._clock = clock
        self._last_stage: Stage | None = None
        self._last_time = float("-inf")
        self._last: Progress | None = None

    def report(self, stage: Stage, urgent: bool = False, **figures: Any) -> None:
        now = self._clock()
        if not urgent and stage is self._last_stage and now - self._last_time < MIN_INTERVAL_SECONDS:
            return
        self._last_stage, self._last_time = stage, now
        reached = self._reached() if stage in _AFTER_TRAINING else self._reached_here(stage, figures)
        progress = self._last = Progress(stage=stage, updated_at=datetime.now(UTC), **reached | figures)
        line = progress.model_dump_json(by_alias=True, exclude_none=True) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        if self._cluster is not None:
            self._cluster.report(progress)

    def _reached(self) -> dict[str, Any]:
        """What the last report says of steps and checkpoints, whoever wrote it."""
        report = last_report(self._path)
        return {name: getattr(report, name) for name in report.model_fields_set & _LASTING} if report else {}

    def _reached_here(self, stage: Stage, figures: Mapping[str, Any]) -> dict[str, Any]:
        """What this process has reported of steps, where a report of a part of one says nothing of them."""
        if self._last is None or stage not in _OF_STEPS or "step" in figures:
            return {}
        names = _LASTING | ({"percent", "eta_seconds"} if stage is self._last.stage else set())
        return {name: getattr(self._last, name) for name in self._last.model_fields_set & names}

    def begin(self) -> None:
        """The run starts: only its driver says so."""
        if self._cluster is not None:
            self._cluster.begin()

    def finish(self, outcome: Outcome) -> None:
        """The run has ended: only its driver says so. Nothing is reported after it."""
        if self._cluster is not None:
            self._cluster.finish(outcome)


def last_report(path: Path) -> Progress | None:
    """The last report in a run's file; None when there is none that can be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
            *_, last = file.read().splitlines()
        return Progress.model_validate_json(last)
    except (OSError, ValueError):
        return None
