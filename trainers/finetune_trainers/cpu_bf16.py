"""bf16 matrix products on CPUs that have no bf16 instructions: in fp32, rounded to bf16.

Such a CPU runs a bf16 product 10 to 100 times slower than an fp32 one. Both add up in fp32, so multiplying in fp32
and rounding the result once gives what bf16 hardware gives, up to the order of the additions. `models.load_model`
applies it; weights, activations and gradients stay bf16.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Float32ProductLinear", "bf16_is_emulated", "use_float32_products"]

FEW_ROWS = 4
"""Below this many rows casting the weight costs more than the slow product does."""


@cache
def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bf16_is_emulated(device: torch.device) -> bool:
    """True where bf16 products go through fp32: on a CPU without bf16 instructions."""
    return device.type == "cpu" and not _cpu_has_bf16()


class _Product(torch.autograd.Function):
    """x [rows, in] · weightᵀ [in, out] in fp32, inputs and result in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = (grad @ weight.float()).to(x.dtype) if need_x else None
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = (
            (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if need_weight else None
        )
        grad_bias = rows.sum(0).to(weight.dtype) if need_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias


class Float32ProductLinear(nn.Linear):
    """nn.Linear whose bf16 products go through fp32; of any other type it is nn.Linear. Obeys autocast."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if input.is_cuda or input.numel() < FEW_ROWS * input.shape[-1]:
            return super().forward(input)
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16:
            input, weight = input.bfloat16(), weight.bfloat16()
            bias = None if bias is None else bias.bfloat16()
        if input.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
            return super().forward(input)
        return _Product.apply(input, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def use_float32_products(model: nn.Module) -> None:
    """Turn every plain nn.Linear under `model` into a Float32ProductLinear, in place; parameters are untouched."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Float32ProductLinear
