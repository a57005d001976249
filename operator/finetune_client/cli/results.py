"""The end of a run, told twice: as one object for programs and as a page for people.

Called by `finetune run`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_api.failures import EXIT_CODES, INTERRUPTED, Failure, FailureClass
from finetune_api.plan import RunPlan
from finetune_api.progress import EvalSummary, Outcome, Progress, Result
from finetune_client.cli.display import duration
from finetune_client.cli.exits import OK
from finetune_operator.status import project

__all__ = ["Ending", "as_document", "as_text", "exit_code_of", "size"]

_LOG_LINES = 20
_LOG_TAIL_BYTES = 16_384
_HEADLINES = {
    FailureClass.USER_ERROR: "The job cannot be run as it is written (UserError)",
    FailureClass.DATA_ERROR: "The data cannot be used (DataError)",
    FailureClass.NON_FINITE_LOSS: "The loss became NaN or infinite (NonFiniteLoss)",
    FailureClass.OUT_OF_MEMORY: "Memory ran out (OutOfMemory)",
    FailureClass.STORAGE_ERROR: "Files could not be read or written (StorageError)",
    FailureClass.UNKNOWN: "The run failed (Unknown)",
}


@dataclass(frozen=True)
class Ending:
    """How a run ended, and where its files are. `workdir` and `log` are None when nothing was started."""

    outcome: Outcome
    progress: Progress | None = None
    plan: RunPlan | None = None
    workdir: Path | None = None
    log: Path | None = None


def exit_code_of(outcome: Outcome) -> int:
    """The exit code of a run that ended so."""
    if outcome.result is Result.SUCCEEDED:
        return OK
    if outcome.result is Result.CANCELLED:
        return INTERRUPTED
    return EXIT_CODES[outcome.failure.failure_class if outcome.failure else FailureClass.UNKNOWN]


def as_document(ending: Ending, now: datetime) -> dict[str, Any]:
    """The job's final status, with eval, artifact, seconds and failureDetails beside it. Every key is always there."""
    outcome = ending.outcome
    summary = outcome.eval or EvalSummary()
    return {
        "name": ending.plan.name if ending.plan else None,
        "result": outcome.result,
        "method": None,
        "tuning": None,
        "progress": None,
        "failure": None,
        **project(outcome, ending.progress, now, plan=ending.plan).to_document(),
        "failureDetails": outcome.failure.to_document() if outcome.failure else None,
        "eval": {"lossBefore": summary.loss_before, "lossAfter": summary.loss_after},
        "artifact": outcome.artifacts[0].uri if outcome.artifacts else None,
        "seconds": outcome.seconds,
        "workdir": str(ending.workdir) if ending.workdir else None,
        "log": str(ending.log) if ending.log else None,
    }


def size(num_bytes: int) -> str:
    """999 B, 1.5 MB or 16.1 GB."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def as_text(ending: Ending) -> str:
    """What a person reads at the end."""
    tellers = {Result.SUCCEEDED: _succeeded, Result.CANCELLED: _stopped, Result.FAILED: _failed}
    return "\n".join(tellers[ending.outcome.result](ending))


def _stopped(ending: Ending) -> list[str]:
    return [f"Stopped {_after(ending)}. No process is left behind.", *_where_the_log_is(ending)]


def _succeeded(ending: Ending) -> list[str]:
    outcome = ending.outcome
    early = " (stopped early: the evaluation loss no longer fell)" if outcome.stopped_early else ""
    lines = [f"Done {_after(ending)}{early}."]
    lines += _evaluation(outcome.eval)
    lines += [
        f"  {'artifact':<10} {artifact.uri} ({artifact.kind}, {size(artifact.bytes)})" for artifact in outcome.artifacts
    ]
    if outcome.seconds:
        spent = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in outcome.seconds.items())
        lines.append(f"  {'time':<10} {spent}")
    if ending.workdir and outcome.artifacts:
        folder = shlex.quote(str(ending.workdir))
        is_adapter = ending.plan is not None and ending.plan.tuning.lora is not None
        lines += ["", "Next:"]
        lines.append(f'  finetune chat {folder} "A question"' + (" --compare-base" if is_adapter else ""))
        lines.append(f"  finetune export {folder} --to ./model" + (" --merge" if is_adapter else ""))
    return lines


def _evaluation(summary: EvalSummary | None) -> list[str]:
    if summary is None or summary.loss_after is None:
        return []
    if summary.loss_before is None:
        return [f"  {'eval loss':<10} {summary.loss_after:.4f}"]
    change = 100 * (summary.loss_after - summary.loss_before) / summary.loss_before if summary.loss_before else 0.0
    return [f"  {'eval loss':<10} {summary.loss_before:.4f} -> {summary.loss_after:.4f} ({change:+.1f} %)"]


def _failed(ending: Ending) -> list[str]:
    outcome = ending.outcome
    failure = outcome.failure or Failure(failure_class=FailureClass.UNKNOWN, message="The trainers did not say why.")
    step = f" after step {failure.step}" if failure.step else ""
    lines = [f"{_HEADLINES[failure.failure_class]}{step}: {failure.message}"]
    lines += [f"  {problem}" for problem in failure.problems]
    lines += _where_the_log_is(ending)
    if failure.failure_class is FailureClass.UNKNOWN and ending.log is not None:
        lines += ["Its last lines:", *(f"  {line}" for line in _tail(ending.log))]
    return lines


def _where_the_log_is(ending: Ending) -> list[str]:
    return [f"The log is {ending.log}"] if ending.log is not None and ending.log.exists() else []


def _tail(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-_LOG_LINES:]


def _after(ending: Ending) -> str:
    # A run that is stopped before its workers answer has reported further than its outcome knows.
    step = max(ending.outcome.step, ending.progress.step if ending.progress else 0)
    of = f" of {ending.outcome.total_steps}" if ending.outcome.total_steps is not None else ""
    return f"after {step}{of} steps"
