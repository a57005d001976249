"""RunPlan: a job with every decision taken. It is the only thing that trainers read, and it never changes under them.

Written by planning, stored as versioned JSON, read by `python -m finetune_trainers --plan FILE`. What only the data
or the model's files can tell (number of steps, size of the model) stays None and is filled in by preparation.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from finetune_api.base import API_VERSION, Contract
from finetune_api.spec import (
    Data,
    EarlyStopping,
    GenerationEval,
    KeepBest,
    Method,
    Model,
    OptimizerSettings,
    Output,
    Precision,
    Tracking,
    Tuning,
)

__all__ = [
    "BatchPlan",
    "CheckpointInterval",
    "CheckpointPlan",
    "Decision",
    "DeepSpeedPlan",
    "Device",
    "ElasticPlan",
    "EvaluationPlan",
    "LearningRatePlan",
    "OptimizationPlan",
    "RunPlan",
    "WorkersPlan",
]


class Device(StrEnum):
    """What a training process computes on."""

    CPU = "cpu"
    CUDA = "cuda"


class ElasticPlan(Contract):
    """How the run goes on while workers are missing."""

    replicas: list[int]
    """With how many instead of all, the most first: the global batch divides by the processes of each."""
    resize_after_seconds: float
    """How long all are waited for, and how long a group of fewer goes on at least before a larger one."""


class WorkersPlan(Contract):
    """The processes that train."""

    replicas: int
    gpus: int
    """GPUs of one worker; each runs one process. 0: one process on the CPU."""
    cpus: float | None
    """Cores of one worker; None shares the machine's evenly."""
    world_size: int
    """Training processes in all: replicas × max(gpus, 1)."""
    device: Device
    elastic: ElasticPlan | None = None
    """None: with all of them or not at all."""

    @property
    def sizes(self) -> list[int]:
        """Numbers of workers with which a group may train, the most first."""
        return [self.replicas, *(self.elastic.replicas if self.elastic is not None else ())]

    @property
    def processes_per_worker(self) -> int:
        """One for each GPU."""
        return max(self.gpus, 1)

    @property
    def cpus_per_process(self) -> float | None:
        """Cores of one training process: those of a worker share the worker's."""
        return None if self.cpus is None else self.cpus / self.processes_per_worker


class BatchPlan(Contract):
    """micro × accumulation × world size = global, always."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int


class LearningRatePlan(Contract):
    """The peak rate, and why."""

    peak: float | None
    """None until the model's size is known: `auto`, and neither the job nor the source's name tells it."""
    reason: str
    schedule: Literal["cosine", "linear", "constant"]
    warmup_fraction: float
    min_fraction: float


class OptimizationPlan(Contract):
    """The optimizer and its schedule."""

    epochs: int | None
    max_steps: int | None
    learning_rate: LearningRatePlan
    adamw: OptimizerSettings
    max_grad_norm: float
    seed: int
    activation_checkpointing: bool
    log_every_steps: int


class EvaluationPlan(Contract):
    """When and how to evaluate."""

    every_steps: int | None
    early_stopping: EarlyStopping | None
    generation: GenerationEval | None


class CheckpointInterval(Contract):
    """How far apart checkpoints are when the run decides: so far that saving costs no more than it may."""

    max_overhead: float
    """Of the time, for which training stands still while state is copied: 0.01 is one second in a hundred."""
    min_seconds: float
    max_seconds: float
    """It is never more than this, whatever saving costs; unless a checkpoint takes longer than that to be written."""


class CheckpointPlan(Contract):
    """Where and when checkpoints are made."""

    uri: str | None
    """Their folder; None: `checkpoints` in the run's working folder."""
    job: str
    """Whose they are: the job's uid, or its namespace/name where it has none. Another job's are never used."""
    every_steps: int | None
    """None: as `interval` says."""
    interval: CheckpointInterval | None = None
    """None: every_steps is set."""
    when_behind: Literal["skip", "wait"] = "skip"
    """What a due checkpoint does while two earlier ones are still being written."""
    keep_last: int
    keep_every: int | None = None
    """Steps: those at its multiples stay."""
    keep_best: KeepBest | None = None
    quota_bytes: int | None = None
    """Most that all may take together."""
    resume: bool
    """Go on from the newest one that is whole."""


class DeepSpeedPlan(Contract):
    """Which engine trains, and its whole configuration."""

    engine: Literal["torch", "deepspeed"]
    """`torch` is for one process with zeroStage 0."""
    zero_stage: int
    config: dict[str, Any]
    """The configuration for `deepspeed.initialize`, complete; empty for the torch engine."""


class Decision(Contract):
    """One thing that planning decided for the user."""

    field: str
    value: str
    reason: str


class RunPlan(Contract):
    """Everything a run needs to know."""

    api_version: Literal["finetune-operator.io/v1alpha1"] = API_VERSION
    kind: Literal["RunPlan"] = "RunPlan"
    name: str
    namespace: str
    storage: str | None
    """Folder of the run's files, as a URI; None: the run's working folder."""
    model: Model
    data: Data
    method: Method
    tuning: Tuning
    workers: WorkersPlan
    batch: BatchPlan
    precision: Precision
    """Never `auto`."""
    optimization: OptimizationPlan
    evaluation: EvaluationPlan
    deepspeed: DeepSpeedPlan
    checkpoint: CheckpointPlan | None = None
    """None: no checkpoints, every attempt begins at step 0."""
    outputs: list[Output]
    tracking: Tracking
    decisions: list[Decision] = Field(default_factory=list)
    """What `auto` and left-out fields became, with reasons."""

    def on(self, replicas: int) -> RunPlan:
        """The same run on so many workers, one of the numbers that it is elastic for: of a global batch that stays as
        it is each process has more, in passes that are no larger."""
        if replicas == self.workers.replicas:
            return self
        world_size = replicas * self.workers.processes_per_worker
        share, rest = divmod(self.batch.global_batch_size, world_size)
        assert not rest, "planning leaves out numbers that do not divide the batch"
        micro = max(size for size in range(1, self.batch.micro_batch_size + 1) if share % size == 0)
        batch = {
            "micro_batch_size": micro,
            "gradient_accumulation_steps": share // micro,
            "world_size": world_size,
        }
        config = self.deepspeed.config | {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": share // micro,
        }
        return self.model_copy(
            update={
                "workers": self.workers.model_copy(update={"replicas": replicas, "world_size": world_size}),
                "batch": self.batch.model_copy(update=batch),
                "deepspeed": self.deepspeed.model_copy(update={"config": config}),
            }
        )
