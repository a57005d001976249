"""Compiles the job's choices into the configuration that `deepspeed.initialize` reads. Pure.

A key that follows from another field of the job is reserved: setting it in `deepspeed.config` as well would let two
places disagree, so it is refused by name, with the field to set instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api.failures import Problem
from finetune_api.plan import BatchPlan
from finetune_api.problems import shorten
from finetune_api.spec import DeepSpeed, Precision

__all__ = ["PARTITION_KEYS", "RESERVED_KEYS", "deepspeed_config", "reserved_key_problems"]

RESERVED_KEYS: dict[str, str] = {
    "train_batch_size": "training.globalBatchSize",
    "train_micro_batch_size_per_gpu": "training.microBatchSize",
    "gradient_accumulation_steps": "training.globalBatchSize and training.microBatchSize",
    "elasticity": "cluster.workers.minReplicas",
    "managed_gradient_accumulation": "training.microBatchSize",
    "gradient_allreduce_op": "training.globalBatchSize",
    "gradient_clipping": "training.maxGradNorm",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "activation_checkpointing": "training.activationCheckpointing",
    "zero_optimization.stage": "deepspeed.zeroStage",
    "zero_optimization.compute_grad_norm": "training.maxGradNorm",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload.optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload.parameters",
    "tensorboard": "tracking.tensorboard",
    "wandb": "tracking.wandb",
    "steps_per_print": "training.logEverySteps",
}

PARTITION_KEYS = frozenset({"zero_hpz_partition_size", "mics_shard_size"})
"""Of zero_optimization: into groups of how many processes all of them are divided."""

_BLOCKS = {key[:place] for key in RESERVED_KEYS for place, letter in enumerate(key) if letter == "."}
"""Mappings that hold a reserved key: anything else in their place would take the key away."""


def reserved_key_problems(config: Mapping[str, Any]) -> list[Problem]:
    """One Problem for each key in the user's `config` that is reserved or would displace one that is."""
    problems = []
    for key, value in _walk(config, ""):
        if key in RESERVED_KEYS:
            message = f"is set by this job; remove it and set spec.{RESERVED_KEYS[key]}"
        elif key in _BLOCKS and not isinstance(value, Mapping):
            message = "must be a mapping of keys to values; this job sets others beside yours"
        else:
            continue
        problems.append(Problem(path=f"spec.deepspeed.config.{key}", value=shorten(value), message=message))
    return problems


def deepspeed_config(
    asked: DeepSpeed, stage: int, batch: BatchPlan, precision: Precision, max_grad_norm: float
) -> dict[str, Any]:
    """The whole configuration, the user's extra keys merged in.

    https://www.deepspeed.ai/docs/config-json/
    """
    zero: dict[str, Any] = {"stage": stage}
    if asked.offload.optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if asked.offload.parameters == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    compiled = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": precision is Precision.BF16},
        "fp16": {"enabled": precision is Precision.FP16, "loss_scale": 0, "initial_scale_power": 16},
        "zero_optimization": zero,
        # torch's own AdamW also serves offloaded states; DeepSpeed's needs a compiler at run time.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,  # the loop prints
    }
    return _merge(compiled, asked.config)


def _walk(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every key of a nested mapping with its dotted path."""
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")


def _merge(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `more`, mappings merged key by key."""
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
