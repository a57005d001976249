"""The policy as another engine reads it: every weight whole, adapters merged, named as in a model's files.

Called by `vllm_engine` before each iteration.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainers.artifact_folder import PEFT_PREFIX
from finetune_trainers.lean_peft import peft
from finetune_trainers.rollout.zero3 import inside

__all__ = ["policy_weights"]

ADAPTER = "default"
"""PEFT's name for the one that the policy is."""
_BASE = "base_layer"


def policy_weights(
    module: nn.Module, dtype: torch.dtype, without: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor in `dtype` on the policy's device) of all weights, a tied one once. `without`: names of parts that
    are not the policy's. Collective under ZeRO-3: every rank must run it to its end, and a tensor is there until the
    next one is asked for.

    An adapter is added to its base in fp32 and rounded once, where the trainer rounds both on their own: in half
    precision the two differ by such roundings.
    """
    module = inside(module)
    adapted: dict[str, Any] = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer) and ADAPTER in layer.lora_A
    }
    for name, parameter in module.named_parameters():
        parts = name.split(".")
        if set(without) & set(parts) or any(part.startswith("lora_") for part in parts):
            continue
        layer = adapted.get(name.removesuffix(f".{_BASE}.weight"))
        used = [parameter, *(_pair(layer) if layer is not None else ())]
        with torch.no_grad(), _whole(used):
            tensor = parameter.detach()
            if layer is not None:
                tensor = tensor.float() + layer.get_delta_weight(ADAPTER).float()
            yield _plain(parts), tensor.to(dtype)


def _pair(layer: Any) -> Sequence[nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _plain(parts: Sequence[str]) -> str:
    return ".".join(part for part in parts if part != _BASE).removeprefix(PEFT_PREFIX)


def _whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside, `parameters` are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    found: AbstractContextManager[Any] = GatheredParameters(list(parameters))
    return found
