"""Warnings that packages raise about each other, where nothing of ours could be done differently. For `pytestmark`.

Each is told by its words and by the module in whose name it is raised, so that any other warning fails its test.
"""

from __future__ import annotations

import pytest

__all__ = ["PEFT_ASKS_TRANSFORMERS", "WHEN_TRAINING"]

PEFT_ASKS_TRANSFORMERS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers.modeling_utils"
)
"""PEFT reads the attribute under the name that transformers has given up."""

DEEPSPEED_CALLS_TORCH = pytest.mark.filterwarnings(
    "ignore:`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    ":FutureWarning:torch.distributed.c10d_logger"
)
"""DeepSpeed calls collectives by names that torch has replaced; torch's logger of calls stands in between."""

TORCH_SCRIPTS = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning:torch.jit._script"
)
"""torch's own modules for oneDNN, which DeepSpeed imports, are made of what torch has replaced."""

RAY_DATA_FILLS_ITS_FIELDS = pytest.mark.filterwarnings(
    "ignore:`[a-z0-9_]+` is deprecated:DeprecationWarning:ray.data.context"
)
"""Ray Train makes Ray Data's settings, which set their own old fields too."""

WHEN_TRAINING = [PEFT_ASKS_TRANSFORMERS, DEEPSPEED_CALLS_TORCH, TORCH_SCRIPTS, RAY_DATA_FILLS_ITS_FIELDS]
"""In tests that train."""
