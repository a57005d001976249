"""What the local kubelet starts for a RayJob: the trainers in the run's folder, by way of `runner.LocalRun`.

`session` makes one `Attempts` for all jobs of a run and hands it to the kubelet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome, Progress
from finetune_client.folders import RunFolder
from finetune_client.runner import LocalRun, RunFolderTaken, written_outcome
from finetune_operator.kinds import Key
from finetune_operator.local.kubelet import CannotLaunch, Launch

__all__ = ["Attempts", "OnReport", "RunningAttempt", "tail"]

OnReport = Callable[[Key, Progress], None]
"""Called with every report of a job's trainers."""

_SIGNALLED = 128
_LOG_LINES = 20
_LOG_BYTES = 16_384


class RunningAttempt:
    """One attempt of one job: an `Entrypoint` of the local kubelet."""

    def __init__(self, job: Key, run: LocalRun, on_report: OnReport) -> None:
        self.run = run
        self.last: Outcome | None = None
        """How it ended, told by the trainers or, if they could not, by their exit code."""
        self._job = job
        self._on_report = on_report
        self._code: int | None = None

    @property
    def progress(self) -> Progress | None:
        """The last report."""
        return self.run.latest

    @property
    def outcome(self) -> Outcome | None:
        """The trainers' own last word, once they have ended."""
        return written_outcome(self.run.workdir) if self._code is not None else None

    @property
    def log_tail(self) -> str:
        """The last lines of the log.

        A process that a signal killed wrote none of them: they are the complaints of the workers that it left alone,
        and would be taken for the cause.
        """
        failure = self.last.failure if self.last is not None else None
        if self._code is not None and self._code > _SIGNALLED and failure is not None:
            return failure.message
        return tail(self.run.log)

    def poll(self) -> int | None:
        """The exit code as a shell has it, once nothing of the attempt is left."""
        for progress in self.run.poll():
            self._on_report(self._job, progress)
        if self.run.ended and self._code is None:
            self.last = self.run.wait()
            code = self.run.exit_code
            self._code = code if code >= 0 else _SIGNALLED - code
        return self._code

    def stop(self, patiently: bool = False) -> None:
        """Ask the trainers to stop."""
        self.run.stop(patiently)


class Attempts:
    """A `Launcher` of the local kubelet, which remembers each job's last attempt."""

    def __init__(self, folder: RunFolder, on_report: OnReport, stop_seconds: float) -> None:
        """`folder` has been entered. `stop_seconds` is how long an attempt may take to stop."""
        self.last: dict[Key, RunningAttempt] = {}
        """By job: the attempt that was started last, in this process."""
        self._folder = folder
        self._on_report = on_report
        self._stop_seconds = stop_seconds

    def __call__(self, launch: Launch) -> RunningAttempt:
        """Start the trainers. Raises CannotLaunch."""
        state = self._folder.state
        try:
            run = LocalRun(
                RunPlan.model_validate_json(launch.plan),
                self._folder.make_room(launch.job, launch.attempt),
                use_ray=state.use_ray,
                cache=Path(state.cache) if state.cache else None,
                environment=_environment(launch),
                stop_seconds=self._stop_seconds,
                guarded=(self._folder.lock,),
            )
            self._folder.save()
            run.start()
        except (OSError, RunFolderTaken, ValidationError) as error:
            raise CannotLaunch(str(error)) from error
        self.last[launch.job] = RunningAttempt(launch.job, run, self._on_report)
        return self.last[launch.job]

    def kill(self) -> None:
        """End every process at once, and wait until they are gone."""
        for attempt in self.last.values():
            if attempt.poll() is None:
                attempt.run.kill()
                attempt.run.wait()


def tail(log: Path) -> str:
    """The last lines of a file; empty when it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_LOG_LINES:])


def _environment(launch: Launch) -> dict[str, str]:
    return {
        "FINETUNE_JOB": launch.job.name,
        "FINETUNE_NAMESPACE": launch.job.namespace,
        "FINETUNE_ATTEMPT": str(launch.attempt),
    }
