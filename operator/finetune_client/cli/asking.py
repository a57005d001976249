"""Asks a process of the trainers' for an answer, shows how far it has come, and prints what comes back.

What `finetune ckpt` and `finetune data` have in common. Nothing here imports what trains, so another process does what
needs that; its side is `finetune_trainers.answering`.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from finetune_api.answers import Refusal, Step, Told
from finetune_api.base import Contract
from finetune_api.failures import INTERRUPTED
from finetune_client.cli.exits import INVALID

__all__ = ["Answer", "Asked", "Tell", "ask", "refuse", "say", "show"]

Tell = Callable[[dict[str, Any]], Iterable[str]]
"""A report -> lines for people."""

_TENTH = 10


@dataclass(frozen=True)
class Asked:
    """A program of the trainers' that answers one request."""

    module: str
    needs: tuple[str, ...]
    """Packages that are not there where only the client is installed."""
    what_it_does: str
    in_bytes: bool = False
    """How its progress is counted."""

    @property
    def command(self) -> Sequence[str]:
        """-P: a random.py in the user's folder must not replace the standard library's."""
        return (sys.executable, "-P", "-m", self.module)


@dataclass(frozen=True)
class Answer:
    """What came back: a report, or why there is none. Neither after Ctrl-C."""

    exit_code: int
    report: dict[str, Any] | None = None
    refusal: Refusal | None = None


def ask(asked: Asked, request: Contract) -> Answer:
    """Progress goes to stderr. What is not told by the other side is told by its exit code."""
    missing = [name for name in asked.needs if importlib.util.find_spec(name) is None]
    if missing:
        message = (
            f"this needs packages that are not installed ({', '.join(missing)});"
            " install the trainers extra: pip install 'finetune-operator[trainers]'"
        )
        return Answer(INVALID, refusal=Refusal(message=message, exit_code=INVALID))
    process = start(asked.command, request.model_dump_json(by_alias=True))
    assert process.stdout is not None
    try:
        told = _follow(process.stdout, asked.in_bytes)
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        return Answer(INTERRUPTED)
    finally:
        process.stdout.close()
    if code in (INTERRUPTED, -signal.SIGINT):
        return Answer(INTERRUPTED)
    if told is None:
        message = f"the process that {asked.what_it_does} ended with exit code {code} and no answer"
        code = max(code, 1)  # of a signal it is below 0
        return Answer(code, refusal=Refusal(message=message, exit_code=code))
    return Answer(code, told.report, told.refusal)


def start(command: Sequence[str], request: str) -> subprocess.Popen[str]:
    """The other side, in our own process group: Ctrl-C reaches it as it reaches us."""
    return subprocess.Popen(
        [*command, request], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def show(answer: Answer, tell: Tell, as_json: bool) -> int:
    """Prints an answer -> the exit code."""
    if answer.report is not None:
        if as_json:
            print(json.dumps(answer.report, indent=2, ensure_ascii=False))
        else:
            for line in tell(answer.report):
                print(line)
        return answer.exit_code
    return INTERRUPTED if answer.refusal is None else refuse(answer.refusal, as_json)


def refuse(refusal: Refusal, as_json: bool) -> int:
    """Prints why there is no report, for people on stderr -> the exit code."""
    problems = list(map(str, refusal.problems))
    sentences = problems if len(problems) > 1 else [refusal.message]
    if refusal.known:
        sentences.append(f"There are: {', '.join(refusal.known)}")
    for sentence in sentences:
        say(sentence)
    if as_json:
        print(json.dumps({"error": refusal.to_document()}, indent=2))
    return refusal.exit_code


def say(sentence: str) -> None:
    """For people: on stderr, where it is in nobody's way."""
    Console(stderr=True).print(sentence, markup=False, highlight=False, soft_wrap=True)


def _follow(lines: IO[str], in_bytes: bool) -> Told | None:
    """The last line, which is the answer."""
    last = None
    with _Display(Console(stderr=True), in_bytes) as display:
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

    def __init__(self, console: Console, in_bytes: bool) -> None:
        self._console = console
        self._in_bytes = in_bytes
        self._bars = console.is_terminal and not console.is_dumb_terminal
        far: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            *far,
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
            far = f"{tenths * 10} %" if self._in_bytes else f"{step.done} of {step.total}"
            self._console.print(f"{step.what}: {far}", markup=False, highlight=False, soft_wrap=True)
