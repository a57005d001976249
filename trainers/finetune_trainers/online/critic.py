"""The critic: how much reward is still to come, read at each token. Added to the policy before the engine is built, so
that one engine, one optimizer and one checkpoint hold both.

With LoRA the critic is a second adapter on the policy's frozen base; otherwise it is a second model. Its head begins at
zero, so that the first iteration's advantages are those of the rewards alone, unless it begins as the reward model. The
policy is then called with `values_at` for values in the place of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_api.spec import Ppo
from finetune_trainers.models import load_dtype, load_model
from finetune_trainers.online.adapters import Adapters
from finetune_trainers.online.critic_beginning import reward_beginning
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.tuning import TunedModel, UnfreezeSchedule, peft_warnings_off

__all__ = ["CRITIC_PARTS", "add_critic"]

CRITIC = "critic"
HEAD = "value_head"
CRITIC_PARTS = (CRITIC, HEAD)
"""Of the policy's module: what writes no answers."""


def add_critic(
    tuned: TunedModel,
    ppo: Ppo,
    plan: RunPlan,
    prepared: PreparedRun,
    device: torch.device,
    zero3_config: dict[str, Any] | None = None,
) -> TunedModel:
    """`tuned` with a critic that learns beside it. Collective under ZeRO-3."""
    model: Any = tuned.model
    own_masters = plan.deepspeed.engine == "torch"
    beginning = reward_beginning(ppo, plan, prepared.model) if ppo.critic.begins_as == "reward" else None
    in_use: Callable[[], AbstractContextManager[None]]
    if plan.tuning.lora is not None:
        with torch.random.fork_rng(range(torch.cuda.device_count())), peft_warnings_off():
            torch.manual_seed(plan.optimization.seed + 1)
            config = beginning.adapter_config(prepared.model) if beginning is not None else model.peft_config["default"]
            model.add_adapter(CRITIC, config, autocast_adapter_dtype=own_masters)
        if beginning is not None:
            beginning.fill_adapter(model, CRITIC)
        backbone, in_use = model.get_base_model().base_model, partial(Adapters(model).using, CRITIC)
    else:
        in_use = nullcontext
        if beginning is not None:
            backbone = beginning.backbone(plan, prepared.model, device, zero3_config)
        else:
            backbone = load_model(prepared.model, plan, device, zero3_config).base_model
        model.add_module(CRITIC, backbone)
        backbone.train()
    config = backbone.config.get_text_config()
    if beginning is not None:
        head = beginning.head(config.hidden_size, load_dtype(plan), device)
    else:
        head = nn.Linear(config.hidden_size, 1, bias=False, dtype=load_dtype(plan), device=device)
        nn.init.zeros_(head.weight)
    model.add_module(HEAD, head)
    _read_values(model, backbone, head, in_use)
    names = _names(model, set(tuned.trainable))
    return TunedModel(
        model,
        trainable=[*tuned.trainable, *names],
        unfreeze=_warm_up(tuned, ppo, prepared.total_steps),
        rate_scales=dict.fromkeys(names, _rate_scale(ppo, prepared)),
        helpers=frozenset(names),
    )


def _names(model: nn.Module, others: set[str]) -> list[str]:
    """Of the critic's parameters, which learn from now on; the policy's go on to."""
    found = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if CRITIC in parts or parts[0] == HEAD:
            found.append(name)
        parameter.requires_grad_(name in others or name in found[-1:])
    return found


def _warm_up(tuned: TunedModel, ppo: Ppo, total_steps: int) -> UnfreezeSchedule | None:
    """The policy begins to learn when the critic has had its iterations."""
    steps = ppo.critic.warmup_iterations * ppo.steps_per_iteration
    if not steps:
        return tuned.unfreeze
    begins = min(steps / total_steps, 1.0)
    late = dict(tuned.unfreeze.groups) if tuned.unfreeze is not None else {}
    waiting = {name for names in late.values() for name in names}
    first = [name for name in tuned.trainable if name not in waiting]
    return UnfreezeSchedule([(begins, first), *((max(at, begins), names) for at, names in late.items())])


def _rate_scale(ppo: Ppo, prepared: PreparedRun) -> float:
    peak = prepared.learning_rate.peak
    return 1.0 if ppo.critic.learning_rate is None or not peak else ppo.critic.learning_rate / peak


def _read_values(
    model: nn.Module, backbone: nn.Module, head: nn.Module, in_use: Callable[[], AbstractContextManager[None]]
) -> None:
    """Let `model` be called with `values_at` [K]: it then returns values, fp32 [K], of those positions of a row."""
    plain = model.forward

    def forward(*args: Any, values_at: Tensor | None = None, **kwargs: Any) -> Any:
        if values_at is None:
            return plain(*args, **kwargs)
        with in_use():
            hidden = backbone(*args, **kwargs).last_hidden_state[0]  # [T, H]
        return head(hidden[values_at])[:, 0].float()

    model.forward = forward
