"""What a user may ask for: the `spec` of a FineTuneJob, block by block.

Every field's docstring is what `kubectl explain` shows. Defaults are those of a careful practitioner; `auto` means
that planning decides and prints its reason. A field is here only when something runs that obeys it.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import Field

from finetune_api.base import Contract, Rule
from finetune_api.spec.checkpoint import Checkpoint, KeepBest
from finetune_api.spec.cluster import Cluster, DeepSpeed, Head, Offload, RuntimeRef, Workers
from finetune_api.spec.data import Columns, Data, DataFormat, DataSource
from finetune_api.spec.lifecycle import (
    MANAGER,
    Action,
    Backoff,
    FailurePolicy,
    FailureRule,
    Lifecycle,
    Scheduling,
    Topology,
)
from finetune_api.spec.method import Dpo, Kto, Method, MethodSettings, Orpo, Reward
from finetune_api.spec.model import Model
from finetune_api.spec.online import Critic, Grpo, KlPenalty, OnlineMethod, Ppo, Sampling, Vllm
from finetune_api.spec.outputs import MlflowTracking, Output, TensorBoardTracking, Tracking, WandbTracking
from finetune_api.spec.pods import EnvVar, KeyOf, Pods, Toleration, Volume
from finetune_api.spec.rewards import (
    FunctionReward,
    HttpReward,
    MetricReward,
    ModelReward,
    RewardSource,
    reward_names,
)
from finetune_api.spec.supervised import Distill, LongRows, Sft, Supervised, Teacher, TeacherAnswers
from finetune_api.spec.training import EarlyStopping, GenerationEval, OptimizerSettings, Precision, Training
from finetune_api.spec.tuning import Freeze, Full, Lora, Quantization, Tuning, UnfreezeStep

__all__ = [
    "MANAGER",
    "Action",
    "Backoff",
    "Checkpoint",
    "Cluster",
    "Columns",
    "Critic",
    "Data",
    "DataFormat",
    "DataSource",
    "DeepSpeed",
    "Distill",
    "Dpo",
    "EarlyStopping",
    "EnvVar",
    "FailurePolicy",
    "FailureRule",
    "FineTuneJobSpec",
    "Freeze",
    "Full",
    "FunctionReward",
    "GenerationEval",
    "Grpo",
    "Head",
    "HttpReward",
    "KeepBest",
    "KeyOf",
    "KlPenalty",
    "Kto",
    "Lifecycle",
    "LongRows",
    "Lora",
    "Method",
    "MethodSettings",
    "MetricReward",
    "MlflowTracking",
    "Model",
    "ModelReward",
    "Offload",
    "OnlineMethod",
    "OptimizerSettings",
    "Orpo",
    "Output",
    "Pods",
    "Ppo",
    "Precision",
    "Quantization",
    "Reward",
    "RewardSource",
    "RuntimeRef",
    "Sampling",
    "Scheduling",
    "Sft",
    "Supervised",
    "Teacher",
    "TeacherAnswers",
    "TensorBoardTracking",
    "Toleration",
    "Topology",
    "Tracking",
    "Training",
    "Tuning",
    "UnfreezeStep",
    "Vllm",
    "Volume",
    "WandbTracking",
    "Workers",
    "reward_names",
]


def _formats_fit(part: str, spec: FineTuneJobSpec) -> bool:
    """Whether the method learns from the formats that `part` of the data names."""
    sources: list[DataSource] = getattr(spec.data, part)
    return all(source.format in {DataFormat.AUTO, *spec.method.formats} for source in sources)


def _answers_can_be_written(part: str, spec: FineTuneJobSpec) -> bool:
    """Whether `part` of the data has answers, where a teacher writes them anew."""
    distill, sources = spec.method.distill, getattr(spec.data, part)
    return distill is None or distill.teacher_answers is None or all(one.format != "text" for one in sources)


class FineTuneJobSpec(Contract):
    """What to train, on what data, how, and where."""

    runtime_ref: RuntimeRef | None = None
    """The platform's pool and defaults."""
    model: Model
    """The model to start from."""
    data: Data
    """Training and evaluation data."""
    method: Method
    """How the model learns."""
    tuning: Tuning
    """Which parameters learn."""
    training: Training
    """Length, batch, rates, evaluation."""
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    """How the training state is spread."""
    cluster: Cluster = Field(default_factory=Cluster)
    """Number and size of workers."""
    checkpoint: Checkpoint | None = None
    """Saving what the next attempt needs to go on. Left out: nothing is saved, and every attempt begins at step 0."""
    outputs: Annotated[list[Output], Field(max_length=8)] = Field(default_factory=list)
    """Where the trained model is written. Left out: the run's own folder."""
    tracking: Tracking = Field(default_factory=Tracking)
    """Experiment trackers."""
    scheduling: Scheduling = Field(default_factory=Scheduling)
    """Who decides when and where it runs."""
    failure_policy: FailurePolicy = Field(default_factory=FailurePolicy)
    """What happens when an attempt fails."""
    lifecycle: Lifecycle = Field(default_factory=Lifecycle)
    """How long it may take, and what is kept."""
    suspend: bool = False
    """Stop training and give the cluster back; false again goes on with a new attempt."""
    managed_by: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", max_length=128)] = MANAGER
    """Who looks after the job. The operator leaves a job alone that names another."""

    rules = (
        Rule(
            cel="!has(self.cluster.workers.gpus) || type(self.training.microBatchSize) != int"
            " || self.training.globalBatchSize % (self.training.microBatchSize * self.cluster.workers.replicas"
            " * (self.cluster.workers.gpus > 0 ? self.cluster.workers.gpus : 1)) == 0",
            message="training.globalBatchSize must be a multiple of microBatchSize × workers.replicas × workers.gpus",
            holds=lambda s: s._batch_divides(),
            field="training.globalBatchSize",
        ),
        Rule(
            cel="!has(self.cluster.workers.minReplicas) || (has(self.checkpoint) && self.checkpoint.resume == 'auto')",
            message="minReplicas needs a checkpoint to go on from; add a checkpoint block (resume: auto), or remove it",
            holds=lambda s: (
                s.cluster.workers.min_replicas is None or (s.checkpoint is not None and s.checkpoint.resume == "auto")
            ),
            field="cluster.workers.minReplicas",
        ),
        Rule(
            cel="!has(self.tuning.lora) || self.tuning.lora.quantization == 'none'"
            " || !has(self.deepspeed.zeroStage) || self.deepspeed.zeroStage != 3",
            message="a quantized base cannot be split by zeroStage 3; set deepspeed.zeroStage to 2 or less",
            holds=lambda s: (
                s.tuning.lora is None or s.tuning.lora.quantization == "none" or s.deepspeed.zero_stage != 3
            ),
            field="deepspeed.zeroStage",
        ),
        Rule(
            cel="!has(self.tuning.lora) || self.tuning.lora.quantization == 'none'"
            " || !(has(self.method.ppo) && has(self.method.ppo.vllm) || has(self.method.grpo)"
            " && has(self.method.grpo.vllm))",
            message="vllm needs whole weights, and a quantized base has none; remove it, or the quantization",
            holds=lambda s: (
                s.tuning.lora is None
                or s.tuning.lora.quantization == "none"
                or s.method.online is None
                or s.method.online.vllm is None
            ),
            field="tuning.lora.quantization",
        ),
        Rule(
            cel="self.outputs.all(o, !o.merge) || has(self.tuning.lora)",
            message="merge is only for tuning.lora; remove it from outputs",
            holds=lambda s: s.tuning.lora is not None or not any(o.merge for o in s.outputs),
            field="outputs",
        ),
        Rule(
            cel="self.data.eval.size() > 0"
            " || !(has(self.training.earlyStopping) || has(self.training.evalEverySteps)"
            " || has(self.training.generation))",
            message="evaluation is asked for and data.eval is empty; add a source to data.eval",
            holds=lambda s: bool(s.data.eval) or not s._wants_evaluation(),
            field="data.eval",
        ),
        *(
            Rule(
                cel="!has(self.method.distill) || !has(self.method.distill.teacherAnswers)"
                f" || self.data.{part}.all(d, d.format != 'text')",
                message="format text has no answers that a teacher could write anew; use another format, or remove"
                " teacherAnswers",
                holds=partial(_answers_can_be_written, part),
                field=f"data.{part}",
            )
            for part in ("train", "eval")
        ),
        *(
            Rule(
                cel=f"self.data.{part}.all(d, d.format == 'auto' || (has(self.method.kto) ?"
                " d.format == 'unpaired-preference' : has(self.method.ppo) || has(self.method.grpo) ?"
                " d.format == 'prompt' : has(self.method.sft) || has(self.method.distill) ?"
                " !(d.format in ['preference', 'unpaired-preference', 'prompt']) : d.format == 'preference'))",
                message="reward, dpo and orpo learn from format preference, kto from unpaired-preference, ppo and grpo"
                " from prompt, sft and distill from the others; set format to auto or to one that the method learns"
                " from",
                holds=partial(_formats_fit, part),
                field=f"data.{part}",
            )
            for part in ("train", "eval")
        ),
        Rule(
            cel="!has(self.training.generation) || !has(self.method.reward)",
            message="a reward model writes no answers; remove generation",
            holds=lambda s: s.training.generation is None or s.method.reward is None,
            field="training.generation",
        ),
        Rule(
            cel="!has(self.training.generation) || !(has(self.method.ppo) || has(self.method.grpo))",
            message="ppo and grpo are evaluated by the rewards of the answers to data.eval; remove generation",
            holds=lambda s: s.training.generation is None or s.method.online is None,
            field="training.generation",
        ),
        Rule(
            cel="!has(self.method.grpo)"
            " || self.training.globalBatchSize * self.method.grpo.miniBatches % self.method.grpo.groupSize == 0",
            message="globalBatchSize × method.grpo.miniBatches must be a multiple of method.grpo.groupSize, since an"
            " iteration has whole groups",
            holds=lambda s: (
                s.method.grpo is None
                or s.training.global_batch_size * s.method.grpo.mini_batches % s.method.grpo.group_size == 0
            ),
            field="training.globalBatchSize",
        ),
        Rule(
            cel="!has(self.method.reward) || self.outputs.all(o, !o.merge)",
            message="the adapter of a reward model is not merged, its head is beside it; remove merge from outputs",
            holds=lambda s: s.method.reward is None or not any(o.merge for o in s.outputs),
            field="outputs",
        ),
        *(
            Rule(
                cel=f"self.{block} == oldSelf.{block}",
                message=f"spec.{block} cannot be changed; create another job",
                field=block,
            )
            for block in ("model", "data", "method", "tuning", "training", "deepspeed", "managedBy")
        ),
        Rule(
            cel="self.cluster == oldSelf.cluster || self.suspend || oldSelf.suspend",
            message="spec.cluster can be changed only while the job is suspended; set suspend to true first",
            field="cluster",
        ),
        Rule(
            cel="has(self.runtimeRef) == has(oldSelf.runtimeRef)",
            message="spec.runtimeRef cannot be added or removed; create another job",
            field="runtimeRef",
        ),
    )

    def _batch_divides(self) -> bool:
        micro, workers = self.training.micro_batch_size, self.cluster.workers
        if micro == "auto" or workers.gpus is None:
            return True  # planning decides, and checks again with the runtime's numbers
        return self.training.global_batch_size % (micro * workers.replicas * max(workers.gpus, 1)) == 0

    def _wants_evaluation(self) -> bool:
        training = self.training
        return any((training.early_stopping, training.eval_every_steps, training.generation))
