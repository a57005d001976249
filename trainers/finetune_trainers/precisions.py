"""What a job calls a precision, as PyTorch does."""

from __future__ import annotations

import torch

from finetune_api.spec import Precision

__all__ = ["DTYPES"]

DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
