"""`finetune validate`: everything that is wrong with some files, at once."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from finetune_api.failures import EXIT_CODES, Failure, FailureClass, Problem
from finetune_client import runner
from finetune_client.cli.exits import INVALID, OK
from finetune_client.loading import Loaded, PlannedJob, load

__all__ = ["as_errors", "validate_files"]


@dataclass
class _Verdict:
    """What a check found: all problems, and the exit code of the first class that was met."""

    problems: list[Problem] = field(default_factory=list)
    exit_code: int = OK

    def add(self, problems: Sequence[Problem], exit_code: int) -> None:
        self.problems += problems
        if problems and self.exit_code == OK:
            self.exit_code = exit_code


def validate_files(files: Sequence[Path], runtimes: Sequence[Path], check_data: bool, as_json: bool) -> int:
    """Check the files, tell what is wrong with them, and return the exit code."""
    loaded, verdict = load(files, runtimes), _Verdict()
    verdict.add(loaded.problems, INVALID)
    if check_data:
        for planned in loaded.planned:
            _check_data(planned, verdict)
    if as_json:
        document = {"valid": not verdict.problems, "errors": as_errors(verdict.problems)}
        print(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _tell(loaded, verdict.problems, check_data)
    return verdict.exit_code


def as_errors(problems: Sequence[Problem]) -> list[dict[str, str | None]]:
    """Problems as programs read them: every key is always there."""
    return [
        {"file": problem.file, "path": problem.path, "value": problem.value, "message": problem.message}
        for problem in problems
    ]


def _tell(loaded: Loaded, problems: Sequence[Problem], checked_data: bool) -> None:
    if problems:
        errors = Console(stderr=True)
        for problem in problems:
            errors.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        errors.print(f"{count} found; nothing was started", markup=False, highlight=False)
        return
    console = Console(highlight=False)
    for planned in loaded.planned:
        checked = "; model and data checked" if checked_data else ""
        console.print(f"{planned.file}: job {planned.plan.name} is valid{checked}", markup=False, soft_wrap=True)
    for name in loaded.runtimes:
        console.print(f"runtime {name} is valid", markup=False, soft_wrap=True)


def _check_data(planned: PlannedJob, verdict: _Verdict) -> None:
    """Let the trainers check the model and every row. They train nothing."""
    if missing := runner.missing_packages():
        message = (
            f"--data needs packages that are not installed ({', '.join(missing)}); "
            "install the trainers extra: pip install 'finetune-operator[trainers]'"
        )
        verdict.add([Problem(file=planned.file, message=message)], INVALID)
        return
    with tempfile.TemporaryDirectory(prefix="finetune-check-") as folder:
        plan = Path(folder, "plan.json")
        plan.write_text(planned.plan.model_dump_json(by_alias=True))
        command = [*runner.TRAINERS, "check", "--plan", str(plan), "--workdir", folder]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != OK:
            failure = runner.outcome_of(Path(folder), done.returncode, stop_requested=False, step=0).failure
            assert failure is not None, "a check that ends with an error code has not succeeded"
            verdict.add(_problems(failure, planned, done.stderr), EXIT_CODES[failure.failure_class])


def _problems(failure: Failure, planned: PlannedJob, log: str) -> list[Problem]:
    if failure.problems:
        return [p if p.file else p.model_copy(update={"file": planned.file}) for p in failure.problems]
    last_lines = "\n".join(log.splitlines()[-20:]) if failure.failure_class is FailureClass.UNKNOWN else ""
    return [Problem(file=planned.file, message="\n".join(filter(None, (failure.message, last_lines))))]
