"""What a person is told of a model that learned from judged answers or from a teacher, and what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import Status
from finetune_api.progress import Artifact, EvalSummary, Outcome, Result
from finetune_client.cli.results import Ending, as_text
from finetune_operator.planning import plan_run
from tests.factories import job

METRICS = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.8, "eval_rewards/margins": 1.25}


def told(method: str, metrics: dict[str, float], tuning: str = "lora", *, evaluated: bool = True) -> str:
    artifact = Artifact(uri="file:///runs/x/artifact", kind="adapter", digest="0", bytes=1000)
    outcome = Outcome(
        result=Result.SUCCEEDED,
        step=4,
        total_steps=4,
        eval=EvalSummary(loss_before=0.6931, loss_after=0.5) if evaluated else None,
        artifacts=[artifact],
        metrics=metrics,
    )
    plan = plan_run(job({"method": {method: {}}, "tuning": {tuning: {}}}))
    ending = Ending(Result.SUCCEEDED, Status(), outcome, plan=plan, workdir=Path("/runs/x"))
    return as_text(ending)


def test_the_share_of_right_pairs_and_the_margin_stand_below_the_loss() -> None:
    text = told("dpo", METRICS)
    assert "eval loss  0.6931 -> 0.5000" in text
    assert "judgement  80% of the evaluation pairs right, reward margin +1.2500" in text


def test_without_pairs_there_is_a_margin_alone_and_without_judgements_nothing() -> None:
    assert "judgement  reward margin -0.5000" in told("kto", {"eval_rewards/margins": -0.5})
    assert "judgement" not in told("sft", {"eval_loss": 1.0})


def test_a_distilled_model_is_told_with_how_near_it_came_to_its_teacher() -> None:
    said = "teacher    the same token at 75% of places, 0.1250 nats away"
    assert said in told("sft", {"eval_kl": 0.125, "eval_token_agreement": 0.75})
    assert "teacher" not in told("sft", {"eval_kl": 0.125})


def test_without_evaluation_the_reward_of_the_last_iteration_is_told() -> None:
    assert "  reward     0.6250 in the last iteration\n" in told("sft", {"reward": 0.625}, evaluated=False)
    assert "reward" not in told("sft", {"loss": 1.0}, evaluated=False)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_reward_model_is_exported_and_not_chatted_with(tuning: str) -> None:
    text = told("reward", METRICS, tuning)
    assert "finetune export /runs/x --to ./reward-model" in text
    assert "chat" not in text
    assert "--merge" not in text


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_policy_is_chatted_with(method: str) -> None:
    assert 'finetune chat /runs/x "A question" --compare-base' in told(method, METRICS)


@pytest.mark.parametrize(
    ("method", "counted"), [("sft", "sequences"), ("dpo", "pairs"), ("reward", "pairs"), ("kto", "answers")]
)
def test_the_plan_counts_what_the_method_counts(method: str, counted: str, finetune: Any, write_job: Any) -> None:
    text = finetune("plan", write_job({"spec.method": {method: {}}})).stdout
    assert f"= 8 {counted} per step" in text
    assert f"method        {method}" in text
