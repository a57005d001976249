"""The engine for one process without ZeRO: torch's own AdamW, autocast and gradient scaler. Built by `engine`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_api.spec import Precision
from finetune_trainers.context import WorkerContext
from finetune_trainers.engine import opening_fractions
from finetune_trainers.errors import NonFiniteLossError
from finetune_trainers.optim import adamw_arguments, param_groups
from finetune_trainers.tuning import TunedModel

__all__ = ["TorchEngine"]

_AUTOCAST = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


class TorchEngine:
    """Trainable weights and optimizer states in fp32, forward and backward in the plan's precision.

    A group that is still closed asks for no gradient: its backward pass costs nothing and it has no optimizer state.
    What is public beside the protocol is for `checkpoint.engine_state` alone.
    """

    takes_parts = True

    def __init__(self, tuned: TunedModel, plan: RunPlan, context: WorkerContext) -> None:
        self.module: nn.Module = tuned.model
        self.device = context.device
        self.groups = param_groups(
            self.module, plan.optimization.adamw.weight_decay, opening_fractions(tuned), tuned.rate_scales
        )
        self._params = [param for group in self.groups for param in group.params]
        _use_fp32(self._params)
        self.adamw = torch.optim.AdamW(**adamw_arguments(self.groups, plan.optimization.adamw), fused=True)
        self._max_grad_norm = plan.optimization.max_grad_norm
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.precision is Precision.FP16)
        if plan.precision in _AUTOCAST:
            _autocast_forward(self.module, self.device.type, _AUTOCAST[plan.precision])

    def begin_step(self, learning_rate: float, done: float) -> None:
        for group, settings in zip(self.groups, self.adamw.param_groups, strict=True):
            settings["lr"] = learning_rate * group.rate_scale
            for param in group.params:
                param.requires_grad_(done >= group.opens_at)

    def backward(self, loss_sum: Tensor, divisor: int) -> None:
        if not loss_sum.requires_grad:
            return  # a part of a loss whose parameters are still closed
        self.scaler.scale(loss_sum / divisor).backward()  # type: ignore[no-untyped-call]

    def step(self) -> float | None:
        self.scaler.unscale_(self.adamw)
        limit = self._max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._params, limit))
        finite = norm < float("inf")  # NaN compares as False
        if not finite and not self.scaler.is_enabled():
            raise NonFiniteLossError(f"the norm of the gradient is {norm}")
        self.scaler.step(self.adamw)  # leaves the update out when the scaled gradient overflowed
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        return norm if finite else None

    def parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.module.named_parameters():
            if names is None or name in names:
                yield name, param.detach().cpu()

    def close(self) -> None:
        self.adamw.state.clear()  # twice the size of the parameters, which writing them can use


def _use_fp32(params: list[nn.Parameter]) -> None:
    """An update of 1e-5 of a weight is lost in bf16, which keeps 8 bits: what trains is held in fp32."""
    for param in params:
        param.data = param.data.float()


def _autocast_forward(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Run the module's forward under autocast, wherever it is called from: the loop, evaluation or generate()."""
    module.forward = torch.autocast(device, dtype)(module.forward)
