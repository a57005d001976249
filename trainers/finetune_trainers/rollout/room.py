"""How much may be written at once: keys and values must have room beside the models. Called when an online method is
built.

It follows from the machine's whole memory and not from what is free: a resumed run must write as the one before it, and
what is written together decides how sums are rounded.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from finetune_trainers.context import WorkerContext

__all__ = ["memory_of", "tokens_that_fit"]

SHARE = 1 / 4
"""Of a process's memory: model, gradients, optimizer and reference stay where they are meanwhile."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def tokens_that_fit(config: Any, item_bytes: int, memory_bytes: float) -> int | None:
    """Of all rows together, whose keys and values are kept; None where transformers' `config` of the model does not
    tell what one takes. `memory_bytes`: this process's, in all."""
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads:
        return None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    channels = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(SHARE * memory_bytes / (2 * layers * key_heads * channels * item_bytes))


def memory_of(context: WorkerContext) -> float:
    """Bytes of this process: its device's, or an even share of this machine's, or container's (cgroup v2)."""
    if context.device.type == "cuda":
        return float(torch.cuda.get_device_properties(context.device).total_memory)
    figures = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    whole = int(figures["MemTotal"].split()[0]) * 1024.0
    with suppress(OSError, ValueError):  # no container of version 2, or no limit: "max"
        whole = min(whole, float(_CGROUP_LIMIT.read_text()))
    return whole / context.local_world_size
