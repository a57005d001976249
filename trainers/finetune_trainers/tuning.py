"""Which parameters learn: all, LoRA adapters, or those whose names match; and which start to learn later.

Called on every worker between `models.load_model` and `engine.build_engine`. Every rank gets the same new weights,
whatever its own random state.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune_api.plan import RunPlan
from finetune_api.spec import Freeze, Lora
from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.precisions import DTYPES

__all__ = [
    "ALL_LINEAR",
    "SCORE_HEAD",
    "TunedModel",
    "UnfreezeSchedule",
    "apply_tuning",
    "linear_names",
    "lora_targets",
    "matching",
]

ALL_LINEAR = "all-linear"
SCORE_HEAD = "score"
"""transformers' name for a reward model's head."""
_LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class UnfreezeSchedule:
    """Progressive unfreezing: (fraction of the steps, names of the parameters that start to learn there), in order."""

    groups: list[tuple[float, list[str]]]


@dataclass(frozen=True)
class TunedModel:
    """A model ready for an engine."""

    model: nn.Module
    trainable: list[str]
    """Parameters that learn at some time; an optimizer is made for these. A tied parameter has one name."""
    unfreeze: UnfreezeSchedule | None = None
    """Those among them that do not learn from the first step."""
    rate_scales: Mapping[str, float] = field(default_factory=dict)
    """By name, what the learning rate is multiplied with; 1 for all others."""
    helpers: frozenset[str] = frozenset()
    """Those among `trainable` that serve training alone, such as a critic: they are no part of the artifact."""

    @property
    def exported(self) -> list[str]:
        """Those among `trainable` that the artifact has."""
        return [name for name in self.trainable if name not in self.helpers]


def apply_tuning(model: nn.Module, plan: RunPlan) -> TunedModel:
    """Prepare `model` for the plan's tuning, in place where it can be. The patterns have been checked by then."""
    if plan.tuning.lora is not None:
        return _add_adapters(model, plan.tuning.lora, plan)
    if plan.tuning.freeze is not None:
        return _freeze(model, plan.tuning.freeze)
    model.requires_grad_(True)
    return TunedModel(model, [name for name, _ in model.named_parameters()])


def matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of parameters that match any pattern, in the model's order.

    A tied parameter is found by each of its names, and given by its first.
    """
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        first_name[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    return [name for name in first_name.values() if name in found]


def transposed(model: nn.Module, modules: Sequence[str]) -> bool:
    """Whether the layers keep their weights as [in, out], as GPT-2's do. PEFT has one answer for all of them."""
    return all(isinstance(model.get_submodule(name), Conv1D) for name in modules)


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers, the output head left out, and the score in its place."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    return [name for name, module in _linear_layers(model) if module is not head]


def lora_targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, list[str]]:
    """Pattern -> full names of the linear layers that it means.

    A pattern is a layer's full name, or its last parts (`q_proj`, `self_attn.q_proj`), with or without wildcards.
    """
    if list(patterns) == [ALL_LINEAR]:
        return {ALL_LINEAR: linear_names(model)}
    layers = [name for name, _ in _linear_layers(model)]
    return {
        pattern: [name for name in layers if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
        for pattern in patterns
    }


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All of them but a reward model's head, which learns as a whole."""
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, _LINEAR) and name != SCORE_HEAD
    ]


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """PEFT 0.21 asks transformers for an attribute by its old name, which is not a user's concern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def _add_adapters(model: nn.Module, lora: Lora, plan: RunPlan) -> TunedModel:
    from finetune_trainers.lean_peft import peft

    targets = sorted({name for names in lora_targets(model, lora.target_modules).values() for name in names})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if plan.method.reward is None else "SEQ_CLS",
        modules_to_save=None if plan.method.reward is None else [SCORE_HEAD],
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed(model, targets),
    )
    # The torch engine updates the adapters themselves, so they are fp32; DeepSpeed makes its own fp32 copies and,
    # under ZeRO-3, cannot gather parameters of another type than the rest.
    own_masters = plan.deepspeed.engine == "torch"
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(plan.optimization.seed)
        with peft_warnings_off():
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=own_masters)
    use_fast_products(adapted, DTYPES[plan.precision], next(model.parameters()).device)
    return TunedModel(adapted, [name for name, p in adapted.named_parameters() if p.requires_grad])


def _freeze(model: nn.Module, freeze: Freeze) -> TunedModel:
    start = matching(model, freeze.train)
    groups: list[tuple[float, list[str]]] = []
    taken = set(start)
    for step in sorted(freeze.unfreeze, key=lambda step: step.at):
        names = [name for name in matching(model, step.layers) if name not in taken]
        taken.update(names)
        groups.append((step.at, names))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in taken)
    trainable = [name for name, _ in model.named_parameters() if name in taken]
    return TunedModel(model, trainable, UnfreezeSchedule(groups) if groups else None)
