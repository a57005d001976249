"""Starts the trainers' side of `finetune data`, shows how far it has come, and brings back its answer."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune_api.base import Contract
from finetune_api.failures import INTERRUPTED
from finetune_api.preference_data import Refusal, Step, Told
from finetune_client.cli.exits import INVALID

__all__ = ["WORKER", "Answer", "ask"]

WORKER: Sequence[str] = (sys.executable, "-P", "-m", "finetune_trainers.preference_data")
"""-P: a random.py in the user's folder must not replace the standard library's."""
NEEDED_PACKAGES = ("finetune_trainers", "numpy", "tokenizers")
_TENTH = 10


@dataclass(frozen=True)
class Answer:
    """What came back: a report, or why there is none."""

    exit_code: int
    report: dict[str, Any] | None = None
    refusal: Refusal | None = None


def ask(request: Contract, console: Console) -> Answer:
    """Progress goes to `console`. What is not told by the other side is told by its exit code."""
    missing = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"this needs packages that are not installed ({', '.join(missing)});"
            " install the trainers extra: pip install 'finetune-operator[trainers]'"
        )
        return Answer(INVALID, refusal=Refusal(message=message, exit_code=INVALID))
    process = start(request.model_dump_json(by_alias=True))
    assert process.stdout is not None
    try:
        told = _follow(process.stdout, console)
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        return Answer(INTERRUPTED)
    finally:
        process.stdout.close()
    return _answer(told, code)


def start(request: str) -> subprocess.Popen[str]:
    """The other side, in our own process group: Ctrl-C reaches it as it reaches us."""
    return subprocess.Popen(
        [*WORKER, request], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def _answer(told: Told | None, code: int) -> Answer:
    if code in (INTERRUPTED, -signal.SIGINT):
        return Answer(INTERRUPTED)
    if told is None:
        message = f"the process that makes the data ended with exit code {code} and no answer"
        return Answer(code if code > 0 else 1, refusal=Refusal(message=message, exit_code=1))
    return Answer(code, told.report, told.refusal)


def _follow(lines: IO[str], console: Console) -> Told | None:
    """The last line, which is the answer."""
    last = None
    with _Display(console) as display:
        for told in _told(lines):
            if told.progress is None:
                last = told
            else:
                display.show(told.progress)
    return last


def _told(lines: IO[str]) -> Iterator[Told]:
    for line in lines:
        with suppress(ValidationError):  # printed by a library
            yield Told.model_validate_json(line)


class _Display:
    """A bar in a terminal, a line for every tenth elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._bars,
        )
        self._task = self._progress.add_task("", total=None, visible=False)
        self._tenths = 0

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, step: Step) -> None:
        if self._bars:
            self._progress.update(
                self._task, description=step.what, completed=step.done, total=step.total, visible=True
            )
            return
        tenths = step.done * _TENTH // step.total if step.total else 0
        if tenths > self._tenths:
            self._tenths = tenths
            told = f"{step.what}: {step.done} of {step.total}"
            self._console.print(told, markup=False, highlight=False, soft_wrap=True)
