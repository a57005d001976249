"""bf16 matrix products on CPUs that have no bf16 instructions: in fp32, rounded to bf16.

Such a CPU runs a bf16 product 10 to 100 times slower than an fp32 one. Both add up in fp32, so multiplying in
fp32 and rounding the result once gives what bf16 hardware gives, up to the order of the additions. Applied by
`models.load_model`, `tuning` and `attention`; weights, activations and gradients stay bf16.

Shapes: x [..., in], weight [out, in], the product [..., out].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Float32ProductLinear", "bf16_is_emulated", "use_float32_products"]

FEW_ROWS = 4
"""With fewer rows of x, casting the weight takes longer than the slow product does."""
BLOCK = 1 << 20
"""Elements of a weight that are cast at a time: they stay in the processor's cache, and an output head of
gigabytes needs no second copy."""


@cache
def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bf16_is_emulated(device: torch.device) -> bool:
    """True where bf16 products go through fp32: on a CPU without bf16 instructions."""
    return device.type == "cpu" and not _cpu_has_bf16()


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in fp32, a run of output rows at a time."""
    rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        yield block, weight[block].float()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        product = x.new_empty((*x.shape[:-1], weight.shape[0]))
        wide = x.float()
        for block, part in _blocks(weight):
            product[..., block] = F.linear(wide, part, None if bias is None else bias[block].float())
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grads[0].float().reshape(-1, weight.shape[0])
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            wide = grad.new_zeros((grad.shape[0], weight.shape[1]))
            for block, part in _blocks(weight):
                wide.addmm_(grad[:, block], part)
            grad_x = wide.to(x.dtype).reshape(x.shape)
        if needs_weight:
            grad_weight = (grad.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if needs_bias and ctx.has_bias:
            grad_bias = grad.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


class Float32ProductLinear(nn.Linear):
    """nn.Linear whose bf16 products go through fp32; of any other type it is nn.Linear. Obeys autocast."""

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias = cast("Tensor | None", self.bias)
        if input.device.type != "cpu" or input.numel() < FEW_ROWS * input.shape[-1]:
            return super().forward(input)
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16:
            input, weight = input.bfloat16(), weight.bfloat16()
            bias = None if bias is None else bias.bfloat16()
        if input.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, _Product.apply(input, weight, bias))  # type: ignore[no-untyped-call]


def use_float32_products(model: nn.Module) -> None:
    """Make every plain nn.Linear under `model` a Float32ProductLinear, in place; its parameters stay as they are.

    A layer that bitsandbytes holds in 8 or 4 bits is given fp32 input, which makes it unpack its weight to fp32.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Float32ProductLinear
        elif type(module).__module__.startswith("bitsandbytes."):
            _give_float32(module)


def _give_float32(layer: nn.Module) -> None:
    forward = layer.forward

    def in_float32(x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, forward(x.to(dtype).float())).to(dtype)

    layer.forward = in_float32
