"""Reward models that are adapters of the policy's own base: held on it, each frozen and with its head, so that there is
one base in memory. Added to the policy before the engine is built, which splits them like the rest under ZeRO-3.

The policy is then called with `judge` for the scores of `score_positions` in the place of logits. They are those of the
same reward model loaded on its own. Nothing of it learns, so no checkpoint and no artifact has any of it.

    H  width of the model      D  documents of a packed row
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from finetune_api.plan import RunPlan
from finetune_api.spec import OnlineMethod, Quantization
from finetune_trainers.context import WorkerContext
from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.frozen import not_split
from finetune_trainers.online.adapters import Adapters
from finetune_trainers.online.reward_adapter import (
    adapted_modules,
    adapter_config,
    fill_adapter,
    head_weight,
    misfit,
)
from finetune_trainers.precisions import DTYPES
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.rewards.judge import OnPolicy
from finetune_trainers.rewards.judge_checks import JudgeFiles, find_judge
from finetune_trainers.rollout.zero3 import inside
from finetune_trainers.tuning import peft_warnings_off

__all__ = ["add_judges", "judge_parts", "judges_of"]

_NAME = "judge_"
"""Of adapter and head, with the reward's place behind it."""
_log = logging.getLogger(__name__)


def add_judges(model: nn.Module, plan: RunPlan, prepared: PreparedModel, context: WorkerContext) -> None:
    """Those reward models of the plan that the policy `model` has room for; why it has none for another is logged.
    Raises UserError when one cannot be found."""
    online = plan.method.online
    assert online is not None, "another method"
    added = False
    for index, reward in enumerate(online.rewards):
        if reward.model is None:
            continue
        field = f"spec.method.{plan.method.chosen}.rewards[{index}].model"
        with not_split():
            files = find_judge(reward.model, field)
        fault = _fault(model, files, plan, prepared)
        if context.rank == 0:
            here, beside = "is held as an adapter on the policy's base", "is loaded beside the policy"
            _log.info("%s %s", field, f"{beside}: it {fault}" if fault else here)
        if fault is None:
            _add(model, f"{_NAME}{index}", files, field, plan, context.device)
            added = True
    if added:
        _read_scores(model)


def judge_parts(online: OnlineMethod) -> list[str]:
    """Names of parts of the policy's module that may be there and write no answers."""
    return [f"{_NAME}{index}" for index, _ in enumerate(online.rewards)]


def judges_of(module: nn.Module) -> dict[int, OnPolicy]:
    """The reward models that the engine's `module` holds, by their place among the rewards."""
    names = [name for name, _ in inside(module).named_children() if name.startswith(_NAME)]
    return {int(name.removeprefix(_NAME)): OnPolicy(module, name) for name in names}


def _fault(model: Any, files: JudgeFiles, plan: RunPlan, prepared: PreparedModel) -> str | None:
    """Why the reward model cannot be on the policy's base, as what is to be said of it; None: it can."""
    lora = plan.tuning.lora
    if lora is None:
        return "needs a frozen base, which a policy without tuning.lora has not"
    if lora.quantization is not Quantization.NONE:
        return "needs its base as it is stored, and tuning.lora.quantization rounds the policy's"
    fault = misfit(files, prepared)
    if fault is not None:
        return fault
    assert files.adapter is not None, "it is no misfit"
    layers = {name for name, _ in model.get_base_model().named_modules()}
    if not adapted_modules(files.adapter) <= layers:
        return "adapts layers that a model that writes calls otherwise"
    return None


def _add(model: Any, name: str, files: JudgeFiles, field: str, plan: RunPlan, device: torch.device) -> None:
    assert files.adapter is not None, "it is no misfit"
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with peft_warnings_off():
        model.add_adapter(name, adapter_config(files.adapter), autocast_adapter_dtype=False)
    fill_adapter(model, name, files.adapter, field)
    weight = head_weight(files.adapter)
    head = nn.Linear(weight.shape[1], 1, bias=False, dtype=DTYPES[plan.precision], device=device)
    with torch.no_grad():
        head.weight.copy_(weight)
    model.add_module(name, head)
    for parameter in model.parameters():  # PEFT has its own ideas of what learns
        parameter.requires_grad_(id(parameter) in learning)
    for key, part in model.named_modules():
        if name in key.split("."):
            use_fast_products(part, DTYPES[plan.precision], device)


def _read_scores(model: Any) -> None:
    """Let `model` be called with `judge`, a name, and `score_positions` [D]: it then returns scores [1, D]."""
    plain, backbone, adapters = model.forward, model.get_base_model().base_model, Adapters(model)

    def forward(*args: Any, judge: str | None = None, score_positions: Tensor | None = None, **kwargs: Any) -> Any:
        if judge is None:
            return plain(*args, **kwargs)
        device = next(model.parameters()).device.type
        with adapters.using(judge), torch.autocast(device, enabled=False):  # as if it were on its own
            hidden = backbone(*args, **kwargs).last_hidden_state[0]  # [T, H]
            return SequenceClassifierOutput(logits=model.get_submodule(judge)(hidden[score_positions]).T)

    model.forward = forward
