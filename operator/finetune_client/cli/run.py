"""`finetune run`: validate, plan, start the trainers, show what they report, and tell how it ended."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from rich.console import Console

from finetune_api.failures import Failure, FailureClass, Problem
from finetune_api.problems import InvalidManifest
from finetune_api.progress import Outcome, Result
from finetune_client.cli.display import Display, open_display
from finetune_client.cli.results import Ending, as_document, as_text, exit_code_of
from finetune_client.loading import PlannedJob, load_one, missing_data, missing_models
from finetune_client.overrides import parse_override
from finetune_client.runner import LocalRun, RunFolderTaken, missing_packages

__all__ = ["RunRequest", "run_job"]

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class RunRequest:
    """What was typed."""

    file: Path
    job: str | None
    runtimes: Sequence[Path]
    overrides: Sequence[str]
    workdir: Path | None
    cache: Path | None
    use_ray: bool
    quiet: bool
    as_json: bool


def run_job(request: RunRequest) -> int:
    """Run the job to its end, tell how it ended, and return the exit code."""
    errors = Console(stderr=True)
    ending = _run(request, open_display(errors, request.quiet))
    succeeded = ending.outcome.result is Result.SUCCEEDED
    if request.as_json:
        print(json.dumps(as_document(ending, datetime.now(UTC)), indent=2))
    if not (request.as_json and request.quiet):
        # A success is the command's result; anything else is for the person who watches.
        console = Console() if succeeded and not request.as_json else errors
        console.print(as_text(ending), markup=False, highlight=False, soft_wrap=True)
    return exit_code_of(ending.outcome)


def _run(request: RunRequest, display: Display) -> Ending:
    try:
        overrides = [parse_override(text) for text in request.overrides]
        planned = load_one(request.file, request.job, request.runtimes, overrides)
    except InvalidManifest as invalid:
        return Ending(_refused(FailureClass.USER_ERROR, "the job is not valid", invalid.problems))
    plan = planned.plan
    if (refusal := _cannot_start(planned)) is not None:
        return Ending(refusal, plan=plan)
    workdir = request.workdir or _new_folder(Path("runs", plan.name), datetime.now(UTC))
    run = LocalRun(plan, workdir, use_ray=request.use_ray, cache=request.cache)
    try:
        outcome = _follow(run, display)
    except RunFolderTaken as taken:
        return Ending(_refused(FailureClass.USER_ERROR, str(taken)), plan=plan)
    except OSError as error:
        message = f"the run's folder {workdir} cannot be used: {error.strerror or error}"
        return Ending(_refused(FailureClass.STORAGE_ERROR, message), plan=plan)
    return Ending(outcome, run.latest, plan, run.workdir, run.log)


def _follow(run: LocalRun, display: Display) -> Outcome:
    with display, _counting_signals() as signals, run:
        display.say(f"Running {run.plan.name} in {run.workdir}")
        for progress in run.events(lambda: _obey(signals(), run, display)):
            display.report(progress)
        return run.wait()


def _obey(num_signals: int, run: LocalRun, display: Display) -> None:
    """The first signal asks the trainers to stop; the second ends them."""
    if num_signals and not run.stop_requested:
        run.stop()
        display.say(f"Stopping cleanly, within {run.stop_seconds:.0f} s; press Ctrl-C again to kill the run")
    elif num_signals > 1 and not run.kill_requested:
        run.kill()
        display.say("Killing the run")


@contextmanager
def _counting_signals() -> Iterator[Callable[[], int]]:
    """Within, Ctrl-C, SIGTERM and SIGHUP are counted and not obeyed. Yields what tells the count.

    Printing or killing inside a handler could meet a half-done print; the run's own loop does both.
    """
    count = 0

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1

    # nohup ignores SIGHUP, and means it.
    numbers = [
        number for number in _STOP_SIGNALS if number is signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cannot_start(planned: PlannedJob) -> Outcome | None:
    """What can be seen at once, before the trainers spend half a minute on imports."""
    if missing := missing_packages():
        message = (
            f"training needs packages that are not installed ({', '.join(missing)}); "
            "install the trainers extra: pip install 'finetune-operator[trainers]'"
        )
        return _refused(FailureClass.USER_ERROR, message)
    if problems := missing_models(planned.plan):
        return _refused(FailureClass.USER_ERROR, "the model is not there", _in_file(problems, planned))
    if problems := missing_data(planned.plan):
        return _refused(FailureClass.DATA_ERROR, "data is not there", _in_file(problems, planned))
    return None


def _in_file(problems: Sequence[Problem], planned: PlannedJob) -> list[Problem]:
    return [problem.model_copy(update={"file": planned.file}) for problem in problems]


def _refused(kind: FailureClass, message: str, problems: Sequence[Problem] = ()) -> Outcome:
    failure = Failure(failure_class=kind, message=message[:4096], problems=list(problems))
    return Outcome(result=Result.FAILED, failure=failure)


def _new_folder(parent: Path, now: datetime) -> Path:
    """A folder named by the time; a number is added when two runs start in the same second."""
    stem = now.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())
