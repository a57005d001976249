"""What a run says of itself while it goes on, and when it has ended.

The trainers write `Progress` as JSON lines, and one `Outcome` at the end; the CLI and the operator read them.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import Contract
from finetune_api.failures import Failure

__all__ = [
    "Artifact",
    "EvalSummary",
    "Lesson",
    "Outcome",
    "Progress",
    "Result",
    "RolloutGap",
    "SavedCheckpoint",
    "Stage",
]


class Stage(StrEnum):
    """What a run is doing, in the order in which it does it."""

    CHECKING_MODEL = "CheckingModel"
    PREPARING_DATA = "PreparingData"
    STARTING_WORKERS = "StartingWorkers"
    LOADING_MODEL = "LoadingModel"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    EXPORTING = "Exporting"
    DONE = "Done"


class SavedCheckpoint(Contract):
    """A checkpoint that is whole and durable."""

    uri: str
    """Its folder."""
    step: int
    """Optimizer steps in it."""
    saved_at: datetime
    """When its manifest was written."""
    world_size: int
    """Training processes that wrote it; any other number can go on from it."""
    bytes: int
    """Of all its files."""


class RolloutGap(Contract):
    """How far another engine that writes rollouts was from the trainer, when it last wrote some."""

    nats: float | None = None
    """Mean |log p - log p_engine| over their tokens; absent where that is no finite number."""
    limit: float
    """The job's gapLimit."""

    @property
    def is_over(self) -> bool:
        """Whether the rollouts are too little those of the policy that learns."""
        return self.nats is None or self.nats > self.limit

    @property
    def sentence(self) -> str:
        """For people: what there is, and what can be done about it."""
        differ = "without measure" if self.nats is None else f"by {self.nats:.3g} nats per token"
        if not self.is_over:
            return f"vLLM and the trainer differ {differ}; gapLimit is {self.limit:g}."
        return (
            f"vLLM and the trainer differ {differ}, and gapLimit is {self.limit:g}; learning is corrected for it, and"
            " less sure. fp32 and maxStaleness 0 make the difference smaller; without vllm there is none."
        )


class Lesson(StrEnum):
    """What an online method has found in its newest rollouts, and in some iterations before."""

    REWARDS_DIFFER = "RewardsDiffer"
    EQUAL_REWARDS = "EqualRewards"
    ALL_CUT_OFF = "AllCutOff"

    @property
    def teaches(self) -> bool:
        """Whether something can be learned from such rollouts."""
        return self is Lesson.REWARDS_DIFFER

    @property
    def sentence(self) -> str:
        """For people: what was found, and what can be done about it."""
        match self:
            case Lesson.EQUAL_REWARDS:
                return (
                    "For some iterations all answers that are compared with one another have had the same reward, which"
                    " teaches nothing. Look at some answers: the reward may tell nothing apart, the prompts be too easy"
                    " or too hard, or sampling.maxNewTokens too small for what is rewarded."
                )
            case Lesson.ALL_CUT_OFF:
                return (
                    "For some iterations all answers have been cut off at sampling.maxNewTokens, so none teaches how to"
                    " end. Raise it, or begin with a model that ends its answers."
                )
            case Lesson.REWARDS_DIFFER:
                return "Rewards differ, and answers come to their end."


class Progress(Contract):
    """One report of a run."""

    stage: Stage
    step: int = 0
    """Optimizer steps done."""
    total_steps: int | None = None
    epoch: float = 0.0
    """Passes over the data done."""
    percent: float = 0.0
    """Of the present stage: steps while training, rows while preparing data; 0 to 100."""
    eta_seconds: float | None = None
    """Seconds until the last optimizer step, evaluations included, at the present pace."""
    tokens_per_second: float | None = None
    """Tokens trained per second over all workers, over the last steps."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """At most 16 figures by name: loss, learning_rate, grad_norm, eval_loss, ..."""
    message: str | None = None
    """A sentence for people."""
    phase: Annotated[str, Field(max_length=40)] | None = None
    """What is done within the stage: generate, score, judge, train, sync or save. Absent where it has one part only."""
    role: Annotated[str, Field(max_length=200)] | None = None
    """Who does it: policy, critic, vLLM, the rewards by name, or all workers, on whom the others wait."""
    world_size: int | None = None
    """Training processes now: fewer than planned while workers are missing. Absent until they train."""
    resumed_from_step: int | None = None
    """Optimizer steps that an earlier attempt had done and that were not done again."""
    checkpoint: SavedCheckpoint | None = None
    """The newest whole checkpoint that this attempt knows of: made by it, or gone on from."""
    rejected_checkpoints: Annotated[list[str], Field(max_length=4)] = Field(default_factory=list)
    """Checkpoints that this attempt would not go on from, each with its name and the reason; the newest four."""
    save_failure: str | None = None
    """Why the last try to save a checkpoint failed; absent once another one has succeeded."""
    rollout_gap: RolloutGap | None = None
    """Of the newest iteration; absent before it and where the policy itself writes."""
    lesson: Lesson | None = None
    """Of an online method; absent until there is one to tell of."""
    updated_at: datetime

    @property
    def doing(self) -> str:
        """Where a run that falls silent is stuck: Training, or `Training: score (reward length)`."""
        role = f" ({self.role})" if self.role else ""
        return f"{self.stage}: {self.phase}{role}" if self.phase else self.stage.value


class EvalSummary(Contract):
    """Evaluation loss (mean over trained tokens, nats; over pairs or answers where they were judged) at the ends."""

    loss_before: float | None = None
    """Before the first optimizer step."""
    loss_after: float | None = None
    """Of the model in the artifact: the best one under early stopping, otherwise the last."""
    reward_before: float | None = None
    """Mean reward before the first step, of a method that maximises one; the loss is then its negative."""
    reward_after: float | None = None
    """Of the model in the artifact."""


class Artifact(Contract):
    """A trained model that was written."""

    uri: str
    """Where it is."""
    kind: str
    """`adapter` (PEFT folder) or `model` (Hugging Face folder)."""
    digest: str
    """blake3 over the artifact's digest list, which names every file."""
    bytes: int
    """Size of all its files."""


class Result(StrEnum):
    """How a run ended."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class Outcome(Contract):
    """The end of a run: the last thing that the trainers write."""

    result: Result
    failure: Failure | None = None
    step: int = 0
    total_steps: int | None = None
    stopped_early: bool = False
    eval: EvalSummary | None = None
    artifacts: list[Artifact] = Field(default_factory=list)
    metrics: dict[str, float] = Field(default_factory=dict)
    """The last value of every figure."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall time by stage."""
