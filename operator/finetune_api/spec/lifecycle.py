"""How long a job may take, what happens when it fails, and who schedules it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract, Rule
from finetune_api.failures import FailureClass
from finetune_api.spec.fields import DnsLabel

__all__ = ["MANAGER", "Action", "Backoff", "FailurePolicy", "FailureRule", "Lifecycle", "Scheduling", "Topology"]

MANAGER = "finetune-operator.io/operator"
"""`managedBy` of the jobs that this operator looks after; it leaves others alone."""

Seconds = Annotated[int, Field(ge=1, le=31_536_000)]


class Action(StrEnum):
    """What happens after an attempt has failed."""

    RETRY = "Retry"
    """Another attempt, counted against maxRestarts."""
    RETRY_FREE = "RetryFree"
    """Another attempt, counted as a preemption and not as a restart."""
    RETRY_WITH_SMALLER_MICRO_BATCH = "RetryWithSmallerMicroBatch"
    """Another attempt with half the micro-batch and twice the accumulation: the same steps in less memory."""
    FAIL = "Fail"
    """The job has failed."""
    SUSPEND = "Suspend"
    """No further attempt until a person sets `suspend` to true and to false again."""


class FailureRule(Contract):
    """What to do after some failures. The first rule that matches wins; all conditions of a rule must match."""

    classes: Annotated[list[FailureClass], Field(max_length=16)] = Field(default_factory=list)
    """Classes of failure; empty matches every class."""
    exit_codes: Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(max_length=32)] = Field(default_factory=list)
    """Exit codes of the trainers; empty matches every code."""
    message_pattern: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Text that occurs in the failure's message, upper and lower case alike; * stands for anything."""
    action: Action
    """What to do."""


class Backoff(Contract):
    """How long to wait before another attempt: the first wait, doubled each time up to the longest."""

    initial_seconds: Seconds = 10
    """Before the second attempt."""
    max_seconds: Seconds = 600
    """At most."""

    rules = (
        Rule(
            cel="self.initialSeconds <= self.maxSeconds",
            message="initialSeconds must not be more than maxSeconds",
            holds=lambda b: b.initial_seconds <= b.max_seconds,
            field="initialSeconds",
        ),
    )


class FailurePolicy(Contract):
    """What happens when an attempt fails.

    Without rules: lost nodes, storage errors, hangs, late starts and unknown failures are tried again; preempted
    attempts are tried again and not counted; out of memory is tried again with a smaller micro-batch; mistakes in the
    job or its data, and a loss that is not finite, fail at once. Three attempts in a row that come no further than
    those before them fail the job; where attempts go on from checkpoints, three that leave no newer one do.
    """

    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """Attempts after the first; preemptions are not counted."""
    max_preemptions: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Preemptions that are borne. Left out: any number."""
    backoff: Backoff = Field(default_factory=Backoff)
    """Wait before another attempt."""
    hang_timeout_seconds: Annotated[int, Field(ge=60, le=604_800)] = 1800
    """A running attempt that reports nothing for this long is taken for hung, ended and classified as Hang."""
    rules_: Annotated[list[FailureRule], Field(max_length=16, alias="rules")] = Field(default_factory=list)
    """What to do after certain failures; looked at before the defaults."""


class Lifecycle(Contract):
    """How long things may take, and what is kept."""

    start_deadline_seconds: Seconds = 3600
    """An attempt whose trainers have not started this long after it was admitted is ended: StartTimeout."""
    suspend_grace_seconds: Annotated[int, Field(ge=0, le=86_400)] = 60
    """A job that saves checkpoints and is suspended may take this long to save one and to stop; 0 suspends at once."""
    active_deadline_seconds: Seconds | None = None
    """Time that all attempts may take together, waiting in a queue not counted. Left out: no limit."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """The job is deleted this long after it has ended, its artifacts are not. Left out: it is kept."""
    keep_failed_cluster_seconds: Annotated[int, Field(ge=0, le=86_400)] = 0
    """Keep the pods of the last failed attempt this long, to look around in them. It holds on to the GPUs."""


class Topology(Contract):
    """Where workers stand in relation to each other."""

    mode: Literal["pack", "spread"]
    """`pack` puts them into one domain, for a fast network; `spread` puts them into as many as there are."""
    key: Annotated[str, Field(min_length=1, max_length=317)] = "topology.kubernetes.io/zone"
    """Node label whose values are the domains."""
    required: bool = False
    """Do not start elsewhere. Otherwise it is a preference."""


class Scheduling(Contract):
    """Who decides when and where the pods run."""

    queue: DnsLabel | None = None
    """Kueue LocalQueue, or Volcano or YuniKorn queue, that the job waits in."""
    scheduler: Literal["default", "kueue", "volcano", "yunikorn"] | None = None
    """What admits the workers together. Left out: the runtime's; with a queue kueue, otherwise default."""
    priority_class: DnsLabel | None = None
    """PriorityClass of the pods; with Kueue, the WorkloadPriorityClass."""
    topology: Topology | None = None
    """Near to or far from each other."""
