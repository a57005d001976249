"""The engine for ZeRO, and for more than one process: `deepspeed.initialize` with the plan's configuration.

What DeepSpeed would scale is undone here: its gradient is the mean over ranks, so the loss is multiplied by their
number; its division by accumulation steps is switched off. Facts about DeepSpeed are those of 0.19.8.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_api.spec import Precision
from finetune_trainers.context import WorkerContext
from finetune_trainers.engine import opening_fractions
from finetune_trainers.errors import NonFiniteLossError
from finetune_trainers.optim import adamw_arguments, param_groups
from finetune_trainers.tuning import TunedModel

__all__ = ["DeepSpeedEngine", "engine_config", "join_group"]

GATHER_BYTES = 1 << 28
"""Parameters gathered at a time when a ZeRO-3 model is saved."""


def join_group(context: WorkerContext) -> None:
    """Import DeepSpeed for this worker's device and give it the process group. Call it before the model is loaded.

    Ray Train has made the group by then; a worker on its own makes a group of one.
    """
    if context.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        dist.init_process_group(
            _backend(context.device), store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
        )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The shared-memory collective is a C++ extension that would be compiled at the first collective. Asking
    # which operators could be compiled takes seconds too, and nothing here uses one: the table stays empty.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(_backend(context.device), auto_mpi_discovery=False, verbose=False)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def engine_config(plan: RunPlan) -> dict[str, Any]:
    """The plan's configuration with what the promise of `engine` needs on top of it."""
    config = copy.deepcopy(plan.deepspeed.config)
    if plan.precision is Precision.BF16 and plan.deepspeed.zero_stage >= 2:
        # gradients of micro-batches are added up in fp32: a bf16 sum loses what is 256 times smaller
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return config


class DeepSpeedEngine:
    """A model under `deepspeed.initialize`. All calls are collective.

    What is public beside the protocol is for `checkpoint.engine_state` alone.
    """

    takes_parts = False  # it counts micro-batches by calls of backward, and reduces gradients in the last one's

    def __init__(self, tuned: TunedModel, plan: RunPlan, context: WorkerContext) -> None:
        import deepspeed

        self.zero_stage = plan.deepspeed.zero_stage
        self._precision = plan.precision
        self._world_size = context.world_size
        self._is_writer = context.rank == 0
        self._scale = 1.0
        self.groups = param_groups(
            tuned.model, plan.optimization.adamw.weight_decay, opening_fractions(tuned), tuned.rate_scales
        )
        # torch's fused AdamW keeps up with DeepSpeed's own on GPU and CPU, and is compiled already
        self.adamw = torch.optim.AdamW(**adamw_arguments(self.groups, plan.optimization.adamw), fused=True)
        self.ds, *_ = deepspeed.initialize(model=tuned.model, optimizer=self.adamw, config=engine_config(plan))
        _restart_bias_correction(self.adamw.state.values())  # some wrappers have made an empty step
        self.is_open = [group.opens_at == 0.0 for group in self.groups]
        self.module: nn.Module = self.ds
        self.device = context.device

    def begin_step(self, learning_rate: float, done: float) -> None:
        for index, group in enumerate(self.groups):
            if not self.is_open[index] and done >= group.opens_at:
                self.is_open[index] = True
                _restart_bias_correction(self._states(index))
            rate = learning_rate * group.rate_scale
            self.adamw.param_groups[index]["lr"] = rate if self.is_open[index] else 0.0
            for param in group.params:
                param.requires_grad_(self.is_open[index])

    def _states(self, group: int) -> Iterable[dict[str, Tensor]]:
        """The optimizer's states of a group, wherever this ZeRO stage keys them."""
        if self.zero_stage == 3:  # pieces of flat partitions, put into the group only for the update
            zero = self.ds.optimizer
            params = [
                flat
                for piece, flat in enumerate(zero.fp32_partitioned_groups_flat)
                if zero.sub_group_to_group_id[piece] == group
            ]
        else:
            params = self.adamw.param_groups[group]["params"]
        return [self.adamw.state[param] for param in params if param in self.adamw.state]

    def backward(self, loss_sum: Tensor, divisor: int) -> None:
        self._scale = self._scale_left_out()
        self.ds.backward(loss_sum * (self._world_size * self._scale / divisor), scale_wrt_gas=False)
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()  # only counts the micro-batch

    def _scale_left_out(self) -> float:
        """In fp16 stage 0's wrapper divides gradients by the loss scale, with which DeepSpeed multiplies the loss for
        the other stages alone."""
        scaling = getattr(self.ds.optimizer, "loss_scale_config", None)
        return 1.0 if scaling is None else float(scaling.cur_scale)

    def step(self) -> float | None:
        norm = self._norm_of_plain_gradients()
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteLossError(f"the norm of the gradient is {norm}")
        self.ds.step()
        if not self.ds.was_step_applied():
            if self._precision is Precision.FP16:
                return None
            raise NonFiniteLossError("the gradient is NaN or infinite")
        return norm if norm is not None else self._norm_of_wrapper()

    def _norm_of_plain_gradients(self) -> float | None:
        """Stage 0 in fp32 has no wrapper that would measure the norm or refuse an update."""
        if self.zero_stage > 0 or self._precision is not Precision.FP32:
            return None
        gradients = [p.grad for group in self.groups for p in group.params if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _norm_of_wrapper(self) -> float:
        return float(self.ds.get_global_grad_norm()) / self._scale  # stage 0 measures the scaled gradient

    def parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        wanted = [(name, param) for name, param in self.ds.module.named_parameters() if names is None or name in names]
        for part in _parts(wanted):
            yield from self._whole(part)

    def _whole(self, part: list[tuple[str, nn.Parameter]]) -> list[tuple[str, Tensor]]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([param for _, param in part], enabled=self.zero_stage == 3):
            if not self._is_writer:
                return []
            return [(name, param.detach().to("cpu", copy=True)) for name, param in part]

    def close(self) -> None:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # transformers splits every model it builds while it knows of ZeRO-3


def _restart_bias_correction(states: Iterable[dict[str, Tensor]]) -> None:
    """Let AdamW count its steps from here: a moment that only ever saw zeros must be corrected like a new one."""
    for state in states:
        if "step" in state:
            state["step"].zero_()


def _parts(params: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """`params` in runs of about GATHER_BYTES."""
    total = 0
    places = []
    for _, param in params:
        places.append(total // GATHER_BYTES)
        total += getattr(param, "ds_numel", param.numel()) * param.element_size()
    for _, run in groupby(zip(places, params, strict=True), key=lambda placed: placed[0]):
        yield [named for _, named in run]
