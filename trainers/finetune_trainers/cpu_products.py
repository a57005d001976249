"""Matrix products on CPUs by the faster of the ways there are. Called by everything that loads a model or adds to one.

cpu_bf16    bf16 where the processor has no instructions for it
cpu_fp32    fp32 where PyTorch's library does not use all that the processor has
"""

from __future__ import annotations

import torch
from torch import nn

from finetune_trainers.cpu_bf16 import bf16_is_emulated, use_float32_products
from finetune_trainers.cpu_fp32 import onednn_is_faster, use_onednn_products

__all__ = ["use_fast_products"]


def use_fast_products(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give the linear layers of `model`, which computes in `dtype` on `device`, the faster products; in place."""
    if device.type != "cpu":
        return
    if dtype is torch.bfloat16 and bf16_is_emulated(device):
        use_float32_products(model)
    elif dtype is torch.float32 and onednn_is_faster():
        use_onednn_products(model)
