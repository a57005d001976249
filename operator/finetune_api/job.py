"""FineTuneJob: the custom resource as a whole, and its status."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import API_VERSION, Contract
from finetune_api.failures import FailureClass
from finetune_api.meta import Metadata
from finetune_api.progress import Artifact, SavedCheckpoint
from finetune_api.spec import FineTuneJobSpec

__all__ = ["Attempt", "Condition", "FineTuneJob", "JobProgress", "Phase", "PostMortem", "Resolved", "Status"]


class Phase(StrEnum):
    """The job's state in a word; for people, derived from the conditions."""

    PENDING = "Pending"
    """Not valid yet, waiting for another job, or waiting before another attempt."""
    QUEUED = "Queued"
    """In a queue, without machines."""
    STARTING = "Starting"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Condition(Contract):
    """One aspect of the job's state, in Kubernetes' own form."""

    type: Annotated[str, Field(max_length=316)]
    """Valid, Admitted, ClusterReady, Running, RolloutFaithful, RolloutsTeach, Checkpointed, Suspended,
    ArtifactsPublished, StatusKept, Complete or Failed."""
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """Why, in a word for machines."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """Why, in a sentence for people."""
    last_transition_time: datetime
    """When `status` last changed."""
    observed_generation: int | None = None
    """The generation of the spec that this was said of."""


class JobProgress(Contract):
    """How far training has come."""

    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    """Optimizer steps in all, once the data has been counted."""
    epoch: str | None = None
    """Passes over the data done."""
    percent: int | None = None
    """Steps done, of all, in percent."""
    eta_seconds: int | None = None
    """Seconds left at the present pace."""
    tokens_per_second: int | None = None
    """Tokens trained per second over all workers."""
    world_size: int | None = None
    """Training processes now, of resolved.worldSize."""
    metrics: Annotated[dict[str, str], Field(max_length=16)] = Field(default_factory=dict)
    """The last figures by name."""
    updated_at: datetime | None = None
    """When the trainers last reported."""


class Attempt(Contract):
    """One try: one Ray cluster from its start to its end."""

    number: Annotated[int, Field(ge=1)]
    """The first is 1."""
    ray_job: str
    """Name of the RayJob."""
    uid: str | None = None
    """Its uid: a RayJob of that name with another uid is not this attempt's."""
    created_at: datetime
    """When the RayJob was asked for."""
    admitted_at: datetime | None = None
    """When it left the queue; without a queue, at once."""
    running_at: datetime | None = None
    """When the trainers made their first step or evaluation."""
    ended_at: datetime | None = None
    """When it ended; absent while it goes on."""
    outcome: Annotated[str, Field(max_length=64)] | None = None
    """Succeeded, Suspended, Cancelled, or the class of the failure."""
    action: Annotated[str, Field(max_length=64)] | None = None
    """What followed from a failure: Retry, RetryFree, RetryWithSmallerMicroBatch, Fail or Suspend."""
    message: Annotated[str, Field(max_length=1024)] | None = None
    """How it ended, in a sentence."""
    step: int = 0
    """The last optimizer step that was reported."""
    resumed_from_step: int | None = None
    """Steps that were done when it began to train: those in the checkpoint that it went on from, or 0."""
    checkpoint_step: int | None = None
    """Steps in the newest checkpoint that it knew of: made by it, or gone on from."""
    stop_asked_at: datetime | None = None
    """When its trainers were asked to save a checkpoint and to stop, because the job was suspended."""
    micro_batch_size: int | None = None
    """Sequences in one pass on one device, where an earlier attempt ran out of memory."""


class PostMortem(Contract):
    """What is known of the last attempt that failed, kept when its pods are gone."""

    attempt: int
    """Its number."""
    failure_class: FailureClass
    """Why it failed."""
    exit_code: int | None = None
    """Of the trainers, or of the container that failed first."""
    pod: Annotated[str, Field(max_length=253)] | None = None
    """The pod that failed first, where that is known."""
    reason: Annotated[str, Field(max_length=256)] | None = None
    """Kubernetes' or Ray's own word for it, such as OOMKilled."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """What was reported, the last lines of the log included."""


class Resolved(Contract):
    """What planning made of the job."""

    world_size: int
    """Training processes in all."""
    gpus: int
    """GPUs of all workers."""
    global_batch_size: int
    """Sequences per optimizer step."""
    micro_batch_size: int
    """Sequences in one pass on one device."""
    gradient_accumulation_steps: int
    """Passes per optimizer step."""
    zero_stage: int
    """How the training state is split."""
    precision: str
    """Arithmetic of forward and backward."""
    runtime_hash: str | None = None
    """Of the runtime as it was when the job was accepted; later changes of the runtime do not reach the job."""


class Status(Contract):
    """What the job has become."""

    observed_generation: int | None = None
    """The generation of the spec that this status is about."""
    phase: Phase = Phase.PENDING
    """Pending, Queued, Starting, Running, Suspended, Succeeded or Failed."""
    reason: str | None = None
    """Why it waits or has failed, in a word; absent where the phase says it all."""
    message: str | None = None
    """The same in a sentence."""
    method: str | None = None
    """The method's name, such as sft."""
    tuning: str | None = None
    """The tuning's name, such as lora."""
    conditions: Annotated[list[Condition], Field(max_length=16)] = Field(default_factory=list)
    """The state in detail."""
    resolved: Resolved | None = None
    """What planning made of the job."""
    progress: JobProgress | None = None
    """How far training has come."""
    checkpoint: SavedCheckpoint | None = None
    """The newest whole checkpoint: what another attempt would go on from."""
    attempts: Annotated[list[Attempt], Field(max_length=10)] = Field(default_factory=list)
    """The last attempts, the newest last."""
    ray_job: str | None = None
    """Name of the present or last attempt's RayJob."""
    restarts: int = 0
    """Attempts that were counted against failurePolicy.maxRestarts."""
    preemptions: int = 0
    """Attempts that were not, because the platform ended them."""
    active_seconds: int = 0
    """Time that the attempts which have ended took together, waiting in a queue not counted."""
    next_attempt_at: datetime | None = None
    """When the next attempt may start, after a failure."""
    failure: FailureClass | None = None
    """Class of the failure that ended the job, such as DataError."""
    post_mortem: PostMortem | None = None
    """What is known of the last attempt that failed."""
    finished_at: datetime | None = None
    """When the job succeeded or failed for good."""
    artifacts: Annotated[list[Artifact], Field(max_length=8)] = Field(default_factory=list)
    """The trained models that were written."""


class FineTuneJob(Contract):
    """A fine-tuning job: a model, data, a method, and where the result goes."""

    api_version: Literal["finetune-operator.io/v1alpha1"] = API_VERSION
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: Metadata
    spec: FineTuneJobSpec
    """What is asked for."""
    status: Status | None = None
    """What has become of it; written by the operator only."""
