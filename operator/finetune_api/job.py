"""FineTuneJob: the custom resource as a whole, and its status."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import API_VERSION, Contract
from finetune_api.failures import FailureClass
from finetune_api.meta import Metadata
from finetune_api.progress import Artifact
from finetune_api.spec import FineTuneJobSpec

__all__ = ["Condition", "FineTuneJob", "JobProgress", "Phase", "Status"]


class Phase(StrEnum):
    """The job's state in a word; for people, derived from the conditions."""

    PENDING = "Pending"
    STARTING = "Starting"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Condition(Contract):
    """One aspect of the job's state, in Kubernetes' own form."""

    type: Annotated[str, Field(max_length=316)]
    """Valid, Running, ArtifactsPublished, Complete or Failed."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
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
    metrics: Annotated[dict[str, str], Field(max_length=16)] = Field(default_factory=dict)
    """The last figures by name."""
    updated_at: datetime | None = None
    """When the trainers last reported."""


class Status(Contract):
    """What the job has become."""

    observed_generation: int | None = None
    """The generation of the spec that this status is about."""
    phase: Phase = Phase.PENDING
    """The state in a word."""
    method: str | None = None
    """The method's name, such as sft."""
    tuning: str | None = None
    """The tuning's name, such as lora."""
    conditions: Annotated[list[Condition], Field(max_length=16)] = Field(default_factory=list)
    """The state in detail."""
    progress: JobProgress | None = None
    """How far training has come."""
    failure: FailureClass | None = None
    """Class of the failure that ended the job."""
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
