"""One job to its end, without anybody who watches: the operator on this machine as a program of its own.

    python -m finetune_client.driver FOLDER             begin what $FINETUNE_SUBMISSION holds, or go on in FOLDER
    python -m finetune_client.driver FOLDER --suspend   ask the driver that works in FOLDER to suspend the job

The backends for Ray start it on the cluster, the local one on this machine. It makes the same passes as `finetune run`
(attempts, failure policy, suspension, status), with the trainers on the Ray cluster that RAY_ADDRESS names. Nobody
shares its disk, so it tells in its own output: what the trainers write to their log, and between those lines the job
itself, marked, whenever that has changed, its figures every quarter of a minute. In FOLDER, job.json holds it as it is.

SIGTERM stops the trainers cleanly and ends it. Exit codes are those of `finetune run`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from finetune_api.failures import EXIT_CODES, INTERRUPTED, FailureClass
from finetune_api.job import FineTuneJob
from finetune_api.runtime import FineTuneRuntime
from finetune_client.attempts import Attempts
from finetune_client.folders import JOB_FILE, STATE_FILE, SUSPEND_FILE, NoRun, RunFolder
from finetune_client.output import ATTEMPT_MARK, JOB_MARK
from finetune_client.runner import RunFolderTaken
from finetune_client.session import Session, key_of_job
from finetune_client.submission import SUBMISSION_VARIABLE, Submitted
from finetune_client.views import JobView
from finetune_operator.kinds import Key

__all__ = ["STOP_SECONDS", "main"]

STOP_SECONDS = 30.0
_QUIET_SECONDS = 15.0
"""Between two reports when nothing but progress has changed: months of training must not fill a disk with them."""
_LINES_BETWEEN = 200
"""Log lines after which the job is told again: whoever reads the last few hundred lines finds it among them."""
_FIGURES = ("progress",)


class Teller:
    """Prints the trainers' log and the job between its lines. Time is passed in, in seconds that only grow."""

    def __init__(self, folder: Path, output: TextIO) -> None:
        """`folder` gets JOB_FILE."""
        self._folder = folder
        self._output = output
        self._said: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}
        self._said_at = float("-inf")
        self._lines = 0
        self._attempt: int | None = None

    def job(self, document: dict[str, Any], now: float, at_once: bool = False) -> None:
        """Tell the job, if that is due."""
        if document != self._shown:
            self._show(document)
        if document == self._said and self._lines < _LINES_BETWEEN:
            return
        is_new = _without_figures(document) != _without_figures(self._said)
        if at_once or is_new or self._lines >= _LINES_BETWEEN or now >= self._said_at + _QUIET_SECONDS:
            self._said, self._said_at, self._lines = document, now, 0
            print(JOB_MARK + json.dumps(document, separators=(",", ":")), file=self._output, flush=True)

    def _show(self, document: dict[str, Any]) -> None:
        """To those who can look into the folder: every change, for it is written over."""
        self._shown = document
        unfinished = self._folder / f".{JOB_FILE}"
        unfinished.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
        unfinished.replace(self._folder / JOB_FILE)

    def log(self, attempt: int, lines: Sequence[str]) -> None:
        """Pass on what the trainers of an attempt have written."""
        if attempt != self._attempt:
            self._attempt = attempt
            print(f"{ATTEMPT_MARK}{attempt}", file=self._output)
        for line in lines:
            print(line, file=self._output)
        self._lines += len(lines)
        if lines:
            self._output.flush()


class Driver:
    """One job in one folder."""

    def __init__(self, folder: RunFolder, output: TextIO, timer: Callable[[], float] = time.monotonic) -> None:
        """`folder` has been entered."""
        self._folder = folder
        self._timer = timer
        self._attempts = Attempts(folder, lambda key, report: self._tell(key), STOP_SECONDS)
        self._session = Session(folder, self._attempts)
        self._teller = Teller(folder.path, output)
        self._log = _Tail()
        self._num_signals = 0

    async def begin(self, submitted: Submitted) -> None:
        """Take a new job."""
        job = FineTuneJob.model_validate(submitted.job)
        await self._session.submit([job], [FineTuneRuntime.model_validate(one) for one in submitted.runtimes])

    async def go_on(self) -> None:
        """Take up the job that is in the folder. Raises NoRun."""
        await self._session.go_on()

    async def work(self) -> int:
        """Until the job is over, suspended or stopped; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        [key] = self._session.jobs
        await self._session.run(lambda: self._look(key))
        self._look(key)
        view = self._view(key)
        self._teller.job(dict(view.document), self._timer(), at_once=True)
        return INTERRUPTED if self._num_signals and not view.is_over else view.exit_code

    def _look(self, key: Key) -> None:
        """Several times a second."""
        request = self._folder.path / SUSPEND_FILE
        if request.exists():
            request.unlink()
            self._session.suspend(key)
        attempt = self._attempts.last.get(key)
        if attempt is not None:
            number = self._session.status(key).attempts[-1].number
            self._teller.log(number, self._log.read(attempt.run.log, attempt.run.pid))
        self._tell(key)

    def _tell(self, key: Key) -> None:
        self._teller.job(dict(self._view(key).document), self._timer())

    def _view(self, key: Key) -> JobView:
        document = self._session.job(key).to_document()
        document["status"] = self._session.status(key).to_document()
        return JobView.of(document)

    def _stop(self) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._session.stop()
        else:
            self._attempts.kill()


class _Tail:
    """The whole lines that were added to a log since the last look; another attempt begins another log."""

    def __init__(self) -> None:
        self._of: int | None = None
        self._offset = 0

    def read(self, log: Path, pid: int) -> list[str]:
        if pid != self._of:
            self._of, self._offset = pid, 0
        try:
            with log.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole) + len(newline)
        return whole.decode(errors="replace").split("\n") if newline else []


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="finetune_client.driver", description="Run one job to its end.")
    parser.add_argument("folder", type=Path, help="of the run; may begin with ~")
    parser.add_argument("--suspend", action="store_true", help="ask the driver that works there to suspend the job")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.expanduser()
    # Ray's workers block SIGINT, which is how trainers are asked to stop, and whoever they start inherits that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if options.suspend:
        (folder / SUSPEND_FILE).touch()
        return 0
    try:
        return _drive(folder, sys.stdout)
    except (NoRun, RunFolderTaken, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_CODES[FailureClass.USER_ERROR]


def _drive(path: Path, output: TextIO) -> int:
    with ExitStack() as closing:
        if (path / STATE_FILE).is_file():
            driver = Driver(closing.enter_context(RunFolder.reopen(path)), output)
            return asyncio.run(_work(driver, None))
        submitted = Submitted.unpacked(os.environ.get(SUBMISSION_VARIABLE, ""))
        key = key_of_job(FineTuneJob.model_validate(submitted.job))
        cache = os.environ.get("FINETUNE_CACHE")
        folder = RunFolder.create(path, {key: "."}, submitted.use_ray, Path(cache) if cache else None)
        return asyncio.run(_work(Driver(closing.enter_context(folder), output), submitted))


async def _work(driver: Driver, submitted: Submitted | None) -> int:
    if submitted is None:
        await driver.go_on()
    else:
        await driver.begin(submitted)
    return await driver.work()


def _without_figures(document: dict[str, Any]) -> dict[str, Any]:
    """The job without what changes with every step."""
    status = document.get("status") or {}
    kept = {name: value for name, value in status.items() if name not in _FIGURES}
    # The last attempt's step is a figure as well.
    kept["attempts"] = [{**one, "step": None} for one in status.get("attempts") or []]
    return {**document, "status": kept}


if __name__ == "__main__":
    sys.exit(main())
