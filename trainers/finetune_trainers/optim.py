"""The optimizer's groups and the learning rate's schedule, as pure functions.

Called by the engines (groups) and the loop (rate). Nothing here knows of DeepSpeed or of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from finetune_api.plan import LearningRatePlan
from finetune_api.spec import OptimizerSettings

__all__ = ["ParamGroup", "adamw_arguments", "lr_at", "param_groups"]


@dataclass
class ParamGroup:
    """Parameters that share weight decay, the moment at which they start to learn, and how fast they do."""

    weight_decay: float
    opens_at: float
    """Fraction of the steps after which the group learns; 0 for those that learn from the start."""
    rate_scale: float = 1.0
    """What the learning rate is multiplied with."""
    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)


def lr_at(step: int, total: int, plan: LearningRatePlan) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total`.

    Warm-up rises linearly over the first ceil(warmup_fraction × total) steps; the step after them uses the peak. Then
    the schedule falls and would reach min_fraction × peak at step `total`, so no step is spent at a rate of zero.
    """
    if plan.peak is None:
        raise ValueError("the learning rate is not resolved yet")
    warmup = math.ceil(plan.warmup_fraction * total)
    if step < warmup:
        return plan.peak * (step + 1) / (warmup + 1)
    if plan.schedule == "constant":
        return plan.peak
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    shape = 1.0 - done if plan.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return plan.peak * (plan.min_fraction + (1.0 - plan.min_fraction) * shape)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    opens_at: Mapping[str, float] | None = None,
    rate_scales: Mapping[str, float] | None = None,
) -> list[ParamGroup]:
    """The trainable parameters of `model`, grouped by (opening, decay, rate), in the model's order.

    Biases and normalisation weights (every parameter with fewer than two dimensions) are not decayed.
    `opens_at` gives the fraction of the steps at which a parameter starts to learn; absent names: at once.
    `rate_scales` gives what its learning rate is multiplied with; absent names: 1.
    """
    groups: dict[tuple[float, bool, float], ParamGroup] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        opens = (opens_at or {}).get(name, 0.0)
        decayed = _num_dimensions(param) >= 2
        scale = (rate_scales or {}).get(name, 1.0)
        group = groups.setdefault((opens, decayed, scale), ParamGroup(weight_decay if decayed else 0.0, opens, scale))
        group.names.append(name)
        group.params.append(param)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1], key[2]))]


def _num_dimensions(param: nn.Parameter) -> int:
    """Dimensions of the whole parameter; under ZeRO-3 `shape` is that of an empty tensor, ds_shape is the true one."""
    return len(getattr(param, "ds_shape", param.shape))


def adamw_arguments(groups: Iterable[ParamGroup], settings: OptimizerSettings) -> dict[str, Any]:
    """Keyword arguments for torch.optim.AdamW and its DeepSpeed twins. The rate is set before each step."""
    return {
        "params": [{"params": group.params, "weight_decay": group.weight_decay} for group in groups],
        "lr": 0.0,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
