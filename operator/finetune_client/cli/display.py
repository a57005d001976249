"""Shows a run while it goes on, on stderr: moving bars in a terminal, a line per report elsewhere.

Called by `finetune run`. stdout is left to the result.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from finetune_api.progress import Progress as Report
from finetune_api.progress import Stage
from finetune_client.telling import duration, watched

__all__ = ["Display", "open_display"]

_STAGES = {
    Stage.CHECKING_MODEL: "Checking the model",
    Stage.PREPARING_DATA: "Preparing data",
    Stage.STARTING_WORKERS: "Starting workers",
    Stage.LOADING_MODEL: "Loading the model",
    Stage.TRAINING: "Training",
    Stage.EVALUATING: "Evaluating",
    Stage.EXPORTING: "Writing the model",
    Stage.DONE: "Done",
}


class Display(Protocol):
    """What a run is shown on. Use it as a context."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def report(self, report: Report) -> None:
        """The run said this."""

    def say(self, sentence: str) -> None:
        """We say this to the person who watches."""


def open_display(console: Console, quiet: bool) -> Display:
    """The display that suits the console; `quiet` shows what is said and not what is reported."""
    if quiet:
        return _Silent(console)
    return _Bars(console) if console.is_terminal and not console.is_dumb_terminal else _Lines(console)


class _Silent:
    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def report(self, report: Report) -> None:
        return None

    def say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)


class _Lines(_Silent):
    """One line per report, without control characters: for log files and CI."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._said: tuple[Stage, int, str | None] | None = None

    def report(self, report: Report) -> None:
        says = (report.stage, report.step, report.message)
        if report.phase is not None and (report.message is None or says == self._said):
            return  # parts of a step come and go; what came of them is told with the step
        self._said = says
        training = report.stage is Stage.TRAINING and report.total_steps is not None
        where = f"step {report.step}/{report.total_steps}" if training else f"{report.percent:.0f} %"
        parts = [f"{_STAGES[report.stage]}: {where}", _figures(report), report.message or ""]
        self.say(", ".join(part for part in parts if part))


class _Bars(_Silent):
    """The present stage with its own bar, and below it the training as a whole."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        name = TextColumn("{task.description:<20}", markup=False)
        text = TextColumn("{task.fields[text]}", markup=False, style="dim")
        self._stage_bar = Progress(name, BarColumn(24), _Percent(), TimeElapsedColumn(), text, console=console)
        self._train_bar = Progress(name, BarColumn(24), MofNCompleteColumn(), text, console=console)
        self._live = Live(Group(self._stage_bar, self._train_bar), console=console, transient=True)
        self._stage = self._stage_bar.add_task("Starting", total=100.0, text="")
        self._training = self._train_bar.add_task("Optimizer steps", total=None, visible=False, text="")
        self._now = Stage.CHECKING_MODEL

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def report(self, report: Report) -> None:
        if report.stage is not self._now:
            self._stage_bar.reset(self._stage)
            self._now = report.stage
        self._stage_bar.update(
            self._stage,
            description=_STAGES[report.stage],
            completed=report.percent,
            text=report.message or (f"{report.phase} ({report.role})" if report.phase and report.role else ""),
        )
        if report.total_steps is not None:
            self._train_bar.update(
                self._training,
                completed=report.step,
                total=report.total_steps,
                visible=True,
                text=_figures(report),
            )


class _Percent(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.percentage:>3.0f} %")


def _figures(report: Report) -> str:
    """What a person watches: loss or reward, speed, time left, the last evaluation."""
    parts = [f"{said} {report.metrics[name]:.4f}" for name, said in watched(report.metrics).items()]
    if report.tokens_per_second is not None:
        parts.append(f"{report.tokens_per_second:,.0f} tokens/s")
    if report.eta_seconds is not None:
        parts.append(f"{duration(report.eta_seconds)} left")
    name, said = ("eval_reward", "eval reward") if "eval_reward" in report.metrics else ("eval_loss", "eval loss")
    if name in report.metrics:
        parts.append(f"{said} {report.metrics[name]:.4f}")
    return ", ".join(parts)
