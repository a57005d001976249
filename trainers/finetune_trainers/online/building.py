"""An online method, from a plan. Called by `methods.building` when the model is in its engine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_api.plan import RunPlan
from finetune_api.spec import OnlineMethod, Precision
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.questions import Questions
from finetune_trainers.evaluation import end_token_ids
from finetune_trainers.frozen import NEVER_LEARNS, load_frozen
from finetune_trainers.methods import Method
from finetune_trainers.models import load_model, load_tokenizer
from finetune_trainers.online.critic import CRITIC_PARTS
from finetune_trainers.online.grpo import Grpo
from finetune_trainers.online.judges import judge_parts, judges_of
from finetune_trainers.online.method import Parts
from finetune_trainers.online.models import Models
from finetune_trainers.online.ppo import Ppo
from finetune_trainers.precisions import DTYPES
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.resting import RestingWeights
from finetune_trainers.rewards.building import build_rewards
from finetune_trainers.rollout import RolloutEngine
from finetune_trainers.rollout.in_process import InProcessEngine
from finetune_trainers.rollout.room import memory_of, tokens_that_fit
from finetune_trainers.rollout.zero3 import inside

__all__ = ["build_online"]

WRITTEN_AT_ONCE = 64
"""Rollouts that a rank writes together, where they have room."""


def build_online(plan: RunPlan, prepared: PreparedRun, module: nn.Module, context: WorkerContext) -> Method:
    """`module` is the engine's. Collective. Raises UserError when a reward cannot be had."""
    method = plan.method
    settings = method.online
    assert settings is not None, "another method"
    tokenizer = load_tokenizer(prepared.model, plan.model.trust_remote_code)
    rewards = build_rewards(settings.rewards, plan, prepared, context, judges_of(module))
    try:
        engine = _engine(plan, prepared, settings, module, tokenizer, context)
    except BaseException:
        rewards.close()
        raise
    reference = _reference(plan, prepared, settings, context)
    resting = RestingWeights(reference, Path(prepared.model.folder)) if reference is not None else None
    parts = Parts(
        models=Models(module, reference, settings.sampling.temperature, resting),
        engine=engine,
        is_exact=engine.is_policy and plan.precision is Precision.FP32,
        rewards=rewards,
        questions=Questions(prepared.data.train, plan.optimization.seed),
        num_iterations=-(-prepared.total_steps // settings.steps_per_iteration),
        eval_questions=list(Questions(prepared.data.eval, plan.optimization.seed)),
        tokenizer=tokenizer,
        batch=plan.batch,
        seed=plan.optimization.seed,
        context=context,
    )
    if method.grpo is not None:
        return Grpo(method.grpo, parts)
    assert method.ppo is not None
    return Ppo(method.ppo, parts)


def _engine(
    plan: RunPlan,
    prepared: PreparedRun,
    settings: OnlineMethod,
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    context: WorkerContext,
) -> RolloutEngine:
    end_ids = end_token_ids(module, tokenizer)
    without = [*CRITIC_PARTS, *judge_parts(settings)]
    if settings.vllm is not None:
        from finetune_trainers.rollout.vllm_engine import start_vllm

        length = settings.max_seq_length
        return start_vllm(plan, prepared.model, settings.vllm, length, module, end_ids, context, without)
    config: Any = inside(module).config
    return InProcessEngine(
        module,
        tokenizer.pad_token_id,
        end_ids,
        context,
        batch_size=WRITTEN_AT_ONCE,
        most_tokens=tokens_that_fit(config.get_text_config(), DTYPES[plan.precision].itemsize, memory_of(context)),
        autocast=_autocast(plan),
        without=without,
    )


def _reference(
    plan: RunPlan, prepared: PreparedRun, settings: OnlineMethod, context: WorkerContext
) -> nn.Module | None:
    """The model as it was before training: with LoRA it is in the policy already."""
    if plan.tuning.lora is not None or not settings.needs_reference:
        return None
    as_model = plan.model_copy(update={"tuning": NEVER_LEARNS})
    return load_frozen(partial(load_model, prepared.model, as_model, context.device), plan)


def _autocast(plan: RunPlan) -> torch.dtype | None:
    """What the torch engine's forward computes in."""
    dtype = DTYPES[plan.precision]
    return dtype if plan.deepspeed.engine == "torch" and dtype is not torch.float32 else None
