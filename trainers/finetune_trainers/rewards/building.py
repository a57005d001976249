"""The rewards of a plan: checked by the launcher before workers start, made on each worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.spec import RewardSource, reward_names
from finetune_trainers.context import WorkerContext
from finetune_trainers.errors import UserError
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.rewards import Rewards, Scorer
from finetune_trainers.rewards.columns import Needed
from finetune_trainers.rewards.endpoint import HttpScorer, header_problems
from finetune_trainers.rewards.functions import FunctionScorer
from finetune_trainers.rewards.metrics import MetricScorer, column_of
from finetune_trainers.rewards.weighted import NamedScorer, WeightedRewards

if TYPE_CHECKING:
    from finetune_trainers.rewards.judge import OnPolicy

__all__ = ["build_rewards", "check_rewards"]


def check_rewards(rewards: Sequence[RewardSource], path: str) -> list[Needed]:
    """The columns that `rewards` need of the rows. `path`: their field, as spec.method.grpo.rewards.

    Functions are imported in processes of their own; a service is not asked. Raises UserError with all that can be
    known to be wrong before an answer is there."""
    problems: list[Problem] = []
    needed: list[Needed] = []
    for index, reward in enumerate(rewards):
        field = f"{path}[{index}].{reward.chosen}"
        if reward.function is not None:
            try:
                scorer = FunctionScorer(reward.function, f"{field}.call")
                needed += [Needed(column, f"{field}.call", reward.function.call) for column in scorer.needs]
                scorer.close()
            except UserError as error:
                problems += error.problems
        elif reward.metric is not None:
            if (column := column_of(reward.metric)) is not None:
                needed.append(Needed(column, f"{field}.column", column))
        elif reward.http is not None:
            problems += header_problems(reward.http, field)
        elif reward.model is not None:
            from finetune_trainers.rewards.judge_checks import check_judge  # brings torch and transformers

            problems += check_judge(reward.model, field)
    if problems:
        raise UserError("; ".join(str(problem) for problem in problems), problems)
    return needed


def build_rewards(
    rewards: Sequence[RewardSource],
    plan: RunPlan,
    prepared: PreparedRun,
    context: WorkerContext,
    on_policy: Mapping[int, OnPolicy] = MappingProxyType({}),
) -> Rewards:
    """The plan's `rewards` on this worker, each with processes and reward models of its own; `on_policy` are those that
    are part of the policy, by their place. Collective. Raises UserError."""
    path = f"spec.method.{plan.method.chosen}.rewards"
    built: list[NamedScorer] = []
    try:
        for index, (name, reward) in enumerate(zip(reward_names(rewards), rewards, strict=True)):
            field = f"{path}[{index}].{reward.chosen}"
            scorer = _scorer(reward, field, plan, prepared, context, on_policy.get(index))
            built.append(NamedScorer(name, field, reward.weight, scorer, in_this_thread=reward.model is not None))
    except BaseException:
        for one in built:
            with suppress(Exception):  # what is told is why there are no rewards
                one.scorer.close()
        raise
    return WeightedRewards(built, tells=context.rank == 0)


def _scorer(
    reward: RewardSource,
    field: str,
    plan: RunPlan,
    prepared: PreparedRun,
    context: WorkerContext,
    on_policy: OnPolicy | None,
) -> Scorer:
    if reward.function is not None:
        return FunctionScorer(reward.function, f"{field}.call")
    if reward.metric is not None:
        return MetricScorer(reward.metric, field)
    if reward.http is not None:
        return HttpScorer(reward.http, field)
    assert reward.model is not None, "a reward is of one kind"
    from finetune_trainers.rewards.judge import load_judge  # brings torch and transformers

    return load_judge(reward.model, field, plan, prepared, context, on_policy)
