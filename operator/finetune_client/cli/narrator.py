"""Tells the person who watches what becomes of their jobs: each attempt's beginning and end, what follows, the waits.

Used by `finetune run`, which shows it every status several times a second; what was said is not said again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime

from finetune_api.job import Attempt, FineTuneJob, Status
from finetune_api.progress import Outcome
from finetune_api.spec.lifecycle import Action
from finetune_client.telling import duration
from finetune_operator.conditions import find
from finetune_operator.kinds import Key

__all__ = ["Narrator"]


class Narrator:
    """Turns changes of status into sentences."""

    def __init__(
        self,
        say: Callable[[str], None],
        clock: Callable[[], datetime],
        last_outcome: Callable[[Key], Outcome | None],
        several: bool,
    ) -> None:
        """`last_outcome` is how a job's last attempt ended, as its process tells; `several` jobs are told by name."""
        self._say = say
        self._clock = clock
        self._last_outcome = last_outcome
        self._several = several
        self._said: set[tuple[Key, str, str | int]] = set()
        self._begun_before: dict[Key, int] = {}
        """The last attempt that had ended when its job was first looked at."""

    def look(self, key: Key, job: FineTuneJob, status: Status) -> None:
        """Say what is new in a job's status."""
        if not status.attempts:
            self._begun_before[key] = 0
            admitted = find(status.conditions, "Admitted")
            if admitted is not None and admitted.status == "False":
                self._once(key, "waiting", admitted.message, admitted.message)
            return
        last = status.attempts[-1]
        if status.checkpoint is not None:
            said = f"The first checkpoint is whole, after step {status.checkpoint.step}: {status.checkpoint.uri}"
            self._once(key, "saved", "first", said if last.number == 1 else "")
        if not self._is_of_an_earlier_run(key, last):
            self._once(key, "begins", last.number, self._begins(last, job))
            if last.resumed_from_step:
                went_on = f"Attempt {last.number} goes on after step {last.resumed_from_step}"
                self._once(key, "resumed", last.number, went_on)
        if last.ended_at is None:
            if last.stop_asked_at is not None:
                self._once(key, "asked", last.number, "Waiting for the trainers to save a checkpoint and to stop")
        elif status.next_attempt_at is not None:
            why = f"Attempt {last.number} failed {_after(last)} ({last.outcome}): {self._why(key, last)}"
            self._once(key, "failed", last.number, why)
            self._once(key, "next", last.number, self._next(last, job, status.next_attempt_at, status.restarts))

    def _is_of_an_earlier_run(self, key: Key, attempt: Attempt) -> bool:
        """It had ended before the first look. One that begins and ends between two looks is told of like any other."""
        if key not in self._begun_before:
            self._begun_before[key] = attempt.number if attempt.ended_at is not None else attempt.number - 1
        return attempt.number <= self._begun_before[key]

    def _begins(self, attempt: Attempt, job: FineTuneJob) -> str:
        if attempt.number == 1:
            return "Starting" if self._several else ""
        checkpoint = job.spec.checkpoint
        if checkpoint is not None and checkpoint.resume == "auto":
            return f"Attempt {attempt.number} begins: it goes on from the newest checkpoint, or at step 0 without one"
        return f"Attempt {attempt.number} begins again at step 0: there is no checkpoint to go on from"

    def _next(self, last: Attempt, job: FineTuneJob, at: datetime, restarts: int) -> str:
        seconds = max(0, math.ceil((at - self._clock()).total_seconds()))
        limit = job.spec.failure_policy.max_restarts
        counted = (
            "not counted as a restart" if last.action == Action.RETRY_FREE else f"restart {restarts} of at most {limit}"
        )
        wait = f"in {seconds} s" if seconds < 60 else f"in {duration(seconds)}"
        smaller = " with half the micro-batch" if last.action == Action.RETRY_WITH_SMALLER_MICRO_BATCH else ""
        return f"Trying again{smaller} {wait} ({counted}); Ctrl-C gives up, and --no-retry never tries again"

    def _why(self, key: Key, attempt: Attempt) -> str:
        """The process itself knows better than the cluster, where it could only tell its exit code."""
        outcome = self._last_outcome(key)
        failure = outcome.failure if outcome else None
        if failure is not None and failure.failure_class == attempt.outcome:
            return failure.message.splitlines()[0]
        return (attempt.message or "it did not say why").splitlines()[0]

    def _once(self, key: Key, topic: str, which: str | int, sentence: str) -> None:
        if sentence and (key, topic, which) not in self._said:
            self._said.add((key, topic, which))
            self._say(f"{key.name}: {sentence}" if self._several else sentence)


def _after(attempt: Attempt) -> str:
    return f"after step {attempt.step}" if attempt.step else "before the first step"
