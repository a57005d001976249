"""Models beside the one that learns: a reference, a reward model, a teacher.

Where ZeRO-3 splits the model that learns over the ranks, it splits these too: no rank keeps all of one, and a forward
pass is a collective, which gathers a layer, computes it and lets go of it. Otherwise each rank holds all of it. A
teacher that writes answers is whole for that time, where it fits (`rollout.zero3`).
Facts about DeepSpeed are those of 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations import deepspeed as zero3_switch

from finetune_api.plan import RunPlan
from finetune_api.spec import Lora, Tuning
from finetune_trainers.engine_deepspeed import engine_config

__all__ = ["NEVER_LEARNS", "load_frozen", "not_split"]

NEVER_LEARNS = Tuning(lora=Lora())
"""For the plan by which `load_model` loads a frozen model: like the base below adapters it has no masters."""


def load_frozen(load: Callable[[dict[str, Any] | None], nn.Module], plan: RunPlan) -> nn.Module:
    """The model that `load` loads onto its device, for inference. Collective.

    `load` is given the configuration by which the ranks split it, None where each holds all. What transformers makes
    inside is split by itself.
    """
    if plan.deepspeed.zero_stage < 3:
        with not_split():
            return load(None).requires_grad_(False).eval()
    import deepspeed

    config = engine_config(plan)
    with _split(config):
        model = load(config).requires_grad_(False).eval()
    # without an optimizer DeepSpeed leaves hooks that gather, and nothing to train with
    engine: nn.Module = deepspeed.initialize(model=model, config=config)[0]
    return engine


@contextmanager
def not_split() -> Iterator[None]:
    """What transformers makes inside is whole, also while a model that ZeRO-3 has split is there."""
    with _switch_kept():
        zero3_switch.unset_hf_deepspeed_config()
        yield


@contextmanager
def _split(config: dict[str, Any]) -> Iterator[None]:
    """What transformers makes inside is split as `config` says."""
    with _switch_kept():
        known = zero3_switch.HfDeepSpeedConfig(config)  # by a name, since transformers holds it weakly
        yield
        del known


@contextmanager
def _switch_kept() -> Iterator[None]:
    """What transformers knows of ZeRO-3 is afterwards what it was."""
    kept = zero3_switch._hf_deepspeed_config_weak_ref
    try:
        yield
    finally:
        zero3_switch._hf_deepspeed_config_weak_ref = kept
