"""How long, how fast, how precisely; when to evaluate and when to stop."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract, Rule, exactly_one
from finetune_api.spec.fields import LearningRate, MicroBatchSize

__all__ = ["EarlyStopping", "GenerationEval", "OptimizerSettings", "Precision", "Training"]


class Precision(StrEnum):
    """Arithmetic of forward and backward; optimizer states and master weights are always fp32."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class EarlyStopping(Contract):
    """Stop when evaluation no longer gets better, and keep the best."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement before training stops."""
    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """By how much the evaluation loss must fall to count as better."""


class GenerationEval(Contract):
    """Let the model answer at each evaluation and compare with the data's answers."""

    max_rows: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Rows to answer, taken from the start of the evaluation data."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 128
    """Longest answer."""


class OptimizerSettings(Contract):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the running mean of squared gradients."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay; biases and normalisation weights are left out of it."""


class Training(Contract):
    """How long, how fast, and how precisely."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over the training data. Set this or maxSteps."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps. Set this or epochs."""
    global_batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = 32
    """Sequences, pairs, answers or rollouts, as the method learns, per optimizer step over all workers, however
    many."""
    micro_batch_size: MicroBatchSize = "auto"
    """How many of those in one forward pass on one device; `auto` picks by sequence length."""
    learning_rate: LearningRate = "auto"
    """Peak learning rate, such as 0.0002, or `auto`: a tenth of the pre-training rate of models of this size for full
    tuning, ten times that for LoRA; for dpo, kto, orpo, ppo and grpo a tenth of either."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Part of the steps over which the rate rises from zero."""
    min_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The rate at the end, as a fraction of the peak."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """Settings of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    precision: Precision = Precision.AUTO
    """`auto` is bf16 on GPUs and fp32 on CPUs."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Order of the data, dropout and new weights follow from it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every_steps: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Optimizer steps between two logged points."""
    eval_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two evaluations. There is always one before the first step, one after each epoch and
    one at the end."""
    early_stopping: EarlyStopping | None = None
    """Stop when the evaluation loss no longer falls."""
    generation: GenerationEval | None = None
    """Also evaluate answers: exact match, BLEU and F1."""

    rules = (
        exactly_one("epochs", "max_steps"),
        Rule(
            cel="type(self.microBatchSize) == int"
            " ? self.microBatchSize >= 1 && self.microBatchSize <= 65536"
            " && self.globalBatchSize % self.microBatchSize == 0"
            " : self.microBatchSize == 'auto'",
            message="globalBatchSize must be a multiple of microBatchSize,"
            " which is a whole number from 1 to 65536, or auto",
            holds=lambda t: t.micro_batch_size == "auto" or t.global_batch_size % t.micro_batch_size == 0,
            field="globalBatchSize",
        ),
    )
