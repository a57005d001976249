"""fp32 matrix products on CPUs where oneDNN multiplies faster than what PyTorch asks for them: Intel's MKL.

MKL uses the 512 bits of AVX-512 on Intel's processors alone; on AMD's it takes half as wide instructions. oneDNN, which
PyTorch has on board for other types, looks at what the processor can do: twice as many products a second on Zen 5.
Both add up in fp32, in another order. Applied by `cpu_products`.

Shapes: x [..., in], weight [out, in], the product [..., out].
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["OneDnnLinear", "linear", "onednn_is_faster", "use_onednn_products"]

FEW_PRODUCTS = 1 << 20
"""Below so many multiplications, calling oneDNN takes longer than it saves."""


@cache
def onednn_is_faster() -> bool:
    """Whether this machine's fp32 products are better made by oneDNN."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (wide and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "GenuineIntel" not in described


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear by the faster way. It has no gradient where that is oneDNN's."""
    if not (_is_fp32(x, weight) and onednn_is_faster() and _are_many(x, weight)):
        return F.linear(x, weight, bias)
    return _product(x, weight, bias)


def _is_fp32(x: Tensor, weight: Tensor) -> bool:
    both = x.dtype is torch.float32 and weight.dtype is torch.float32
    return both and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _are_many(x: Tensor, weight: Tensor) -> bool:
    return x.numel() * weight.shape[0] >= FEW_PRODUCTS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # What comes from a sum is one number seen from many places, which oneDNN does not read.
        grad = grads[0].reshape(-1, weight.shape[0]).contiguous()
        rows = x.reshape(-1, x.shape[-1])
        return (
            _product(grad, weight.t(), None).reshape(x.shape) if needs_x else None,
            _product(grad.t(), rows.t(), None) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class OneDnnLinear(nn.Linear):
    """nn.Linear whose fp32 products on a CPU are oneDNN's, unless they are few; of any other type it is nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        if not (_is_fp32(input, self.weight) and _are_many(input, self.weight)):
            return super().forward(input)
        return cast(Tensor, _Product.apply(input, self.weight, self.bias))  # type: ignore[no-untyped-call]


def use_onednn_products(model: nn.Module) -> None:
    """Make every plain nn.Linear under `model` a OneDnnLinear, in place; its parameters stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
