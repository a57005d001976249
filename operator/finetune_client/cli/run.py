"""`finetune run`: validate, plan, let the operator on this machine run the jobs, show it, and tell how it ended."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from finetune_api.failures import Failure, FailureClass, Problem
from finetune_api.problems import InvalidManifest
from finetune_api.progress import Outcome, Result
from finetune_api.spec.lifecycle import MANAGER
from finetune_client.attempts import Attempts
from finetune_client.cli.display import Display, open_display
from finetune_client.cli.endings import ending_of
from finetune_client.cli.exits import OK
from finetune_client.cli.narrator import Narrator
from finetune_client.cli.results import Ending, as_document, as_text, exit_code_of
from finetune_client.cli.signals import counting_signals
from finetune_client.folders import NoRun, RunFolder
from finetune_client.loading import PlannedJob, load_all, load_one, missing_data, missing_jobs, missing_models
from finetune_client.overrides import Override, parse_override
from finetune_client.runner import RunFolderTaken, missing_packages
from finetune_client.session import Session, key_of_job
from finetune_operator.kinds import Key
from finetune_operator.status import project

__all__ = ["RunRequest", "run_job"]

_STOP_SECONDS = 30.0


@dataclass(frozen=True)
class RunRequest:
    """What was typed."""

    file: Path | None
    everything_in: Path | None
    """A file or folder in the place of `file`, of which every job is run."""
    job: str | None
    runtimes: Sequence[Path]
    overrides: Sequence[str]
    workdir: Path | None
    cache: Path | None
    use_ray: bool
    quiet: bool
    as_json: bool
    all_of_file: bool = False
    retry: bool = True
    suspend_after: int | None = None
    resume: Path | None = None

    @property
    def all_jobs(self) -> bool:
        """Whether every job that is found is run, and not one."""
        return self.all_of_file or self.everything_in is not None


class _Refused(Exception):
    """Nothing was started."""

    def __init__(self, failure: Failure, planned: PlannedJob | None = None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.planned = planned


def run_job(request: RunRequest) -> int:
    """Run the job, or all of them, to the end; tell how it ended, and return the exit code."""
    errors = Console(stderr=True)
    try:
        endings = _run(request, open_display(errors, request.quiet))
    except _Refused as refused:
        endings = [_ending_of_nothing(refused)]
    if request.as_json:
        documents = [as_document(ending) for ending in endings]
        print(json.dumps({"jobs": documents} if request.all_jobs else documents[0], indent=2))
    if not (request.as_json and request.quiet):
        for ending in endings:
            _tell(ending, errors, request, several=len(endings) > 1)
    return next((code for ending in endings if (code := exit_code_of(ending)) != OK), OK)


def _tell(ending: Ending, errors: Console, request: RunRequest, several: bool) -> None:
    """A success is the command's result; anything else is for the person who watches."""
    console = Console() if ending.result == Result.SUCCEEDED and not request.as_json else errors
    name = f"{ending.name}: " if several else ""
    console.print(name + as_text(ending), markup=False, highlight=False, soft_wrap=True)


def _run(request: RunRequest, display: Display) -> list[Ending]:
    if request.resume is not None:
        return _in_folder(_reopened(request, request.resume, display), [], request, display)
    jobs = _load(request)
    for planned in jobs:
        _check(planned)
    first = jobs[0].plan
    workdir = request.workdir or _new_folder(Path("runs", first.name), datetime.now(UTC))
    folders = {key_of_job(one.job): one.plan.name if request.all_jobs else "." for one in jobs}
    return _in_folder(RunFolder.create(workdir, folders, request.use_ray, request.cache), jobs, request, display)


def _in_folder(folder: RunFolder, jobs: Sequence[PlannedJob], request: RunRequest, display: Display) -> list[Ending]:
    planned = jobs[0] if jobs else None
    try:
        with folder:
            return asyncio.run(_Run(folder, jobs, request, display).play())
    except (RunFolderTaken, NoRun) as error:
        raise _refused(FailureClass.USER_ERROR, str(error), planned) from error
    except OSError as error:
        message = f"the run's folder {folder.path} cannot be used: {error.strerror or error}"
        raise _refused(FailureClass.STORAGE_ERROR, message, planned) from error


class _Run:
    """A session, shown and steered."""

    def __init__(self, folder: RunFolder, jobs: Sequence[PlannedJob], request: RunRequest, display: Display) -> None:
        self._folder = folder
        self._jobs = jobs
        self._request = request
        self._display = display
        self._attempts = Attempts(folder, lambda _, progress: display.report(progress), _STOP_SECONDS)
        self._session = Session(folder, self._attempts)
        self._suspended: set[Key] = set()
        self._killed = False
        self._seen = 0

    async def play(self) -> list[Ending]:
        """To the end, whatever it is. Raises NoRun."""
        session = self._session
        with self._display, counting_signals() as num_signals:
            try:
                await self._begin()
                narrator = Narrator(self._display.say, session.now, self._last_outcome, len(session.jobs) > 1)
                await session.run(lambda: self._look(num_signals(), narrator))
            finally:
                self._attempts.kill()
        return [ending_of(session, key, self._attempts.last.get(key)) for key in session.jobs]

    async def _begin(self) -> None:
        if self._request.resume is None:
            runtimes = {one.runtime.metadata.name: one.runtime for one in self._jobs if one.runtime is not None}
            await self._session.submit([one.job for one in self._jobs], runtimes.values())
        else:
            await self._session.go_on()
        names = ", ".join(key.name for key in self._session.jobs)
        self._display.say(f"Running {names} in {self._folder.path}")

    def _look(self, num_signals: int, narrator: Narrator) -> None:
        is_news, self._seen = self._seen != self._session.version, self._session.version
        for key in self._session.jobs:
            if is_news:
                narrator.look(key, self._session.job(key), self._session.status(key))
            self._suspend_when_due(key)
        self._obey(num_signals)

    def _suspend_when_due(self, key: Key) -> None:
        limit, attempt = self._request.suspend_after, self._attempts.last.get(key)
        step = attempt.progress.step if attempt is not None and attempt.progress is not None else 0
        if limit is not None and step >= limit and key not in self._suspended:
            self._suspended.add(key)
            self._session.suspend(key)
            self._display.say(f"Suspending after step {step}")

    def _obey(self, num_signals: int) -> None:
        """The first signal asks the trainers to stop; the second ends them."""
        if num_signals and not self._session.stopping:
            if self._session.is_training:
                self._display.say(f"Stopping cleanly, within {_STOP_SECONDS:.0f} s; press Ctrl-C again to kill the run")
            self._session.stop()
        elif num_signals > 1 and not self._killed:
            self._killed = True
            self._display.say("Killing the run")
            self._attempts.kill()

    def _last_outcome(self, key: Key) -> Outcome | None:
        attempt = self._attempts.last.get(key)
        return attempt.last if attempt is not None else None


def _load(request: RunRequest) -> list[PlannedJob]:
    """The jobs to run. Raises _Refused."""
    try:
        file = _one_file(request)
        overrides = [parse_override(text) for text in request.overrides]
        if not request.retry:
            overrides.append(Override(("failurePolicy", "rules"), [{"action": "Fail"}]))
        if request.all_jobs:
            jobs = load_all(file, request.runtimes, overrides)
        else:
            jobs = [load_one(file, request.job, request.runtimes, overrides)]
    except InvalidManifest as invalid:
        raise _refused(FailureClass.USER_ERROR, "the job is not valid", None, invalid.problems) from invalid
    if problems := missing_jobs(jobs):
        raise _refused(FailureClass.USER_ERROR, "a job that it needs is not there", jobs[0], problems)
    return jobs


def _one_file(request: RunRequest) -> Path:
    file, everything = request.file, "-f" if request.everything_in is not None else "--all"
    refusals = (
        (file is None and everything == "--all", "name the file with the job, or a run's folder with --resume"),
        (file is not None and everything == "-f", "jobs are named by FILE or by -f; use one of them"),
        (
            request.all_jobs and request.job is not None,
            f"--job chooses one job and {everything} runs every one; use one of them",
        ),
        (
            request.all_jobs and request.suspend_after is not None,
            f"--suspend-after is for one job; leave {everything} out",
        ),
    )
    for is_so, message in refusals:
        if is_so:
            raise _refused(FailureClass.USER_ERROR, message)
    found = request.everything_in or file
    assert found is not None
    return found


def _reopened(request: RunRequest, folder: Path, display: Display) -> RunFolder:
    given = {
        "FILE": request.file is not None,
        "--workdir": request.workdir is not None,
        "--cache": request.cache is not None,
        "--job": request.job is not None,
        "--all": request.all_of_file,
        "-f": request.everything_in is not None,
        "--runtime": bool(request.runtimes),
        "--set": bool(request.overrides),
        "--no-ray": not request.use_ray,
        "--no-retry": not request.retry,
    }
    if wrong := [name for name, is_given in given.items() if is_given]:
        message = f"--resume goes on with a run as it was begun; leave out: {', '.join(wrong)}"
        raise _refused(FailureClass.USER_ERROR, message)
    try:
        if missing := missing_packages():
            raise _missing(missing, None)
        return RunFolder.reopen(folder, display.say)
    except NoRun as error:
        raise _refused(FailureClass.USER_ERROR, str(error)) from error


def _check(planned: PlannedJob) -> None:
    """What can be seen at once, before the trainers spend half a minute on imports. Raises _Refused."""
    if missing := missing_packages():
        raise _missing(missing, planned)
    if planned.job.spec.managed_by != MANAGER:
        message = f"spec.managedBy gives the job to {planned.job.spec.managed_by}; remove it to run the job here"
        raise _refused(FailureClass.USER_ERROR, message, planned)
    if problems := missing_models(planned.plan):
        raise _refused(FailureClass.USER_ERROR, "the model is not there", planned, _in_file(problems, planned))
    if problems := missing_data(planned.plan):
        raise _refused(FailureClass.DATA_ERROR, "data is not there", planned, _in_file(problems, planned))


def _missing(packages: Sequence[str], planned: PlannedJob | None) -> _Refused:
    message = (
        f"training needs packages that are not installed ({', '.join(packages)}); "
        "install the trainers extra: pip install 'finetune-operator[trainers]'"
    )
    return _refused(FailureClass.USER_ERROR, message, planned)


def _in_file(problems: Sequence[Problem], planned: PlannedJob) -> list[Problem]:
    return [problem.model_copy(update={"file": planned.file}) for problem in problems]


def _refused(
    kind: FailureClass, message: str, planned: PlannedJob | None = None, problems: Sequence[Problem] = ()
) -> _Refused:
    return _Refused(Failure(failure_class=kind, message=message[:4096], problems=list(problems)), planned)


def _ending_of_nothing(refused: _Refused) -> Ending:
    outcome = Outcome(result=Result.FAILED, failure=refused.failure)
    plan = refused.planned.plan if refused.planned else None
    status = project(outcome, None, datetime.now(UTC), plan=plan)
    return Ending(Result.FAILED, status, outcome, name=plan.name if plan else None, plan=plan)


def _new_folder(parent: Path, now: datetime) -> Path:
    """A folder named by the time; a number is added when two runs start in the same second."""
    stem = now.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())
