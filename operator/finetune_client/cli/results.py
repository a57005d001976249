"""The end of a run, told twice: as one object for programs and as a page for people.

Called by `finetune run`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.failures import EXIT_CODES, INTERRUPTED, Failure, FailureClass
from finetune_api.job import Status
from finetune_api.plan import RunPlan
from finetune_api.progress import EvalSummary, Outcome, Progress, Result
from finetune_client.attempts import tail
from finetune_client.cli.exits import OK, SUSPENDED
from finetune_client.cli.sizes import size
from finetune_client.telling import duration

__all__ = ["SUSPENDED_RESULT", "Ending", "as_document", "as_text", "exit_code_of"]

SUSPENDED_RESULT = "Suspended"
"""Beside the results that a run can have: a job that was suspended has none yet."""

_HEADLINES = {
    FailureClass.USER_ERROR: "The job cannot be run as it is written (UserError)",
    FailureClass.DATA_ERROR: "The data cannot be used (DataError)",
    FailureClass.NON_FINITE_LOSS: "The loss became NaN or infinite (NonFiniteLoss)",
    FailureClass.KL_DIVERGED: "The model strayed too far from its reference (KLDiverged)",
    FailureClass.OUT_OF_MEMORY: "Memory ran out (OutOfMemory)",
    FailureClass.STORAGE_ERROR: "Files could not be read or written (StorageError)",
    FailureClass.START_TIMEOUT: "The trainers did not start in time (StartTimeout)",
    FailureClass.HANG: "The trainers reported nothing for too long (Hang)",
    FailureClass.DEADLINE_EXCEEDED: "The job took longer than it may (DeadlineExceeded)",
    FailureClass.DEPENDENCY_FAILED: "The job that this one waits for has no model for it (DependencyFailed)",
    FailureClass.UNKNOWN: "The run failed (Unknown)",
}
_STATUS_KEYS = [field.alias or name for name, field in Status.model_fields.items()]


@dataclass(frozen=True)
class Ending:
    """How a job ended, and where its files are. `workdir` and `log` are None when nothing was started."""

    result: str
    """Of `Result`, or Suspended."""
    status: Status
    """As kubectl would show it."""
    outcome: Outcome
    """Of the last attempt, as far as it is known; its failure is the job's."""
    name: str | None = None
    """Of the job."""
    progress: Progress | None = None
    plan: RunPlan | None = None
    workdir: Path | None = None
    log: Path | None = None
    can_go_on: bool = False
    """`--resume` would take it up again."""
    run: Path | None = None
    """The folder to name for that."""


def exit_code_of(ending: Ending) -> int:
    """The exit code of a run that ended so."""
    match ending.result:
        case Result.SUCCEEDED:
            return OK
        case Result.CANCELLED:
            return INTERRUPTED
        case "Suspended":
            return SUSPENDED
    failure = ending.outcome.failure
    return EXIT_CODES[failure.failure_class if failure else FailureClass.UNKNOWN]


def as_document(ending: Ending) -> dict[str, Any]:
    """The job's final status, with eval, artifact, seconds and failureDetails beside it. Every key is always there."""
    outcome = ending.outcome
    summary = outcome.eval or EvalSummary()
    return {
        "name": ending.name,
        "result": ending.result,
        **dict.fromkeys(_STATUS_KEYS),
        **ending.status.to_document(),
        "failureDetails": outcome.failure.to_document() if outcome.failure else None,
        "eval": {"lossBefore": summary.loss_before, "lossAfter": summary.loss_after, **_rewards(summary)},
        "artifact": outcome.artifacts[0].uri if outcome.artifacts else None,
        "seconds": outcome.seconds,
        "workdir": str(ending.workdir) if ending.workdir else None,
        "log": str(ending.log) if ending.log else None,
    }


def as_text(ending: Ending) -> str:
    """What a person reads at the end."""
    tellers = {
        Result.SUCCEEDED: _succeeded,
        Result.CANCELLED: _stopped,
        Result.FAILED: _failed,
        SUSPENDED_RESULT: _suspended,
    }
    return "\n".join(tellers[ending.result](ending))


def _stopped(ending: Ending) -> list[str]:
    lines = [f"Stopped {_after(ending)}. No process is left behind.", *_where_the_log_is(ending)]
    return [*lines, *(_how_to_go_on(ending) or _where_the_checkpoint_is(ending))]


def _suspended(ending: Ending) -> list[str]:
    return [f"Suspended {_after(ending)}. No process is left behind.", *_how_to_go_on(ending)]


def _how_to_go_on(ending: Ending) -> list[str]:
    if not ending.can_go_on or ending.run is None:
        return []
    lines = ["", "Next:", f"  finetune run --resume {shlex.quote(str(ending.run))}"]
    saved = ending.status.checkpoint
    if saved is None:
        return [*lines, "There is no checkpoint: the next attempt begins again at step 0."]
    return [*lines, f"The next attempt goes on after step {saved.step}.", *_where_the_checkpoint_is(ending)]


def _succeeded(ending: Ending) -> list[str]:
    outcome = ending.outcome
    early = " (stopped early: the evaluation loss no longer fell)" if outcome.stopped_early else ""
    lines = [f"Done {_after(ending)}{early}."]
    lines += [*_evaluation(outcome), *_preference(outcome.metrics), *_teaching(outcome.metrics)]
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
        if ending.plan is not None and ending.plan.method.reward is not None:
            lines.append(f"  finetune export {folder} --to ./reward-model")  # it scores answers and writes none
            return lines
        lines.append(f'  finetune chat {folder} "A question"' + (" --compare-base" if is_adapter else ""))
        lines.append(f"  finetune export {folder} --to ./model" + (" --merge" if is_adapter else ""))
    return lines


def _rewards(summary: EvalSummary) -> dict[str, float | None]:
    """Of methods that maximise one."""
    if summary.reward_after is None and summary.reward_before is None:
        return {}
    return {"rewardBefore": summary.reward_before, "rewardAfter": summary.reward_after}


def _evaluation(outcome: Outcome) -> list[str]:
    summary = outcome.eval
    if summary is None or summary.loss_after is None:
        reward = outcome.metrics.get("reward")
        return [] if reward is None else [f"  {'reward':<10} {reward:.4f} in the last iteration"]
    if summary.reward_after is not None:
        before = "" if summary.reward_before is None else f"{summary.reward_before:.4f} -> "
        return [f"  {'reward':<10} {before}{summary.reward_after:.4f}"]
    if summary.loss_before is None:
        return [f"  {'eval loss':<10} {summary.loss_after:.4f}"]
    change = 100 * (summary.loss_after - summary.loss_before) / summary.loss_before if summary.loss_before else 0.0
    return [f"  {'eval loss':<10} {summary.loss_before:.4f} -> {summary.loss_after:.4f} ({change:+.1f} %)"]


def _preference(metrics: Mapping[str, float]) -> list[str]:
    """How often the evaluation's better answer is the better one for the model, where answers were judged."""
    accuracy, margin = metrics.get("eval_rewards/accuracies"), metrics.get("eval_rewards/margins")
    if margin is None:
        return []
    right = "" if accuracy is None else f"{accuracy:.0%} of the evaluation pairs right, "
    return [f"  {'judgement':<10} {right}reward margin {margin:+.4f}"]


def _teaching(metrics: Mapping[str, float]) -> list[str]:
    """How near a distilled model came to its teacher, on the evaluation data."""
    kl, agreement = metrics.get("eval_kl"), metrics.get("eval_token_agreement")
    if kl is None or agreement is None:
        return []
    return [f"  {'teacher':<10} the same token at {agreement:.0%} of places, {kl:.4f} nats away"]


def _failed(ending: Ending) -> list[str]:
    outcome = ending.outcome
    failure = outcome.failure or Failure(failure_class=FailureClass.UNKNOWN, message="The trainers did not say why.")
    step = f" after step {failure.step}" if failure.step else ""
    headline = _HEADLINES.get(failure.failure_class, f"The run failed ({failure.failure_class})")
    lines = [f"{headline}{step}: {failure.message}", *_attempts(ending.status)]
    lines += [f"  {problem}" for problem in failure.problems]
    lines += _where_the_checkpoint_is(ending)
    lines += _where_the_log_is(ending)
    if failure.failure_class is FailureClass.UNKNOWN and ending.log is not None:
        lines += ["Its last lines:", *(f"  {line}" for line in tail(ending.log).splitlines())]
    return lines


def _attempts(status: Status) -> list[str]:
    """What was tried, when it was more than one attempt."""
    if len(status.attempts) < 2:
        return []
    tries = ", ".join(f"{one.number} ended after step {one.step} ({one.outcome})" for one in status.attempts)
    return [f"Attempts: {tries}"]


def _where_the_checkpoint_is(ending: Ending) -> list[str]:
    saved = ending.status.checkpoint
    return [f"The checkpoint of step {saved.step} is {saved.uri} ({size(saved.bytes)})"] if saved is not None else []


def _where_the_log_is(ending: Ending) -> list[str]:
    return [f"The log is {ending.log}"] if ending.log is not None and ending.log.exists() else []


def _after(ending: Ending) -> str:
    # A run that is stopped before its workers answer has reported further than its outcome knows.
    step = max(ending.outcome.step, ending.progress.step if ending.progress else 0)
    of = f" of {ending.outcome.total_steps}" if ending.outcome.total_steps is not None else ""
    return f"after {step}{of} steps"
