"""Rewards in the runs that learn from them: what goes wrong with one is seen, counted, and ends nothing too early."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome
from finetune_trainers.launch import check
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import JudgedWorld
from tests.trainers.online.online_world import COMMON, OnlineWorld
from tests.trainers.rewards.worlds import MODULE

pytestmark = [pytest.mark.training, *WHEN_TRAINING]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("online"))


def grpo(online: OnlineWorld, *rewards: dict[str, Any], steps: int = 3) -> RunPlan:
    method = {"grpo": {"maxSeqLength": 64, "sampling": {"maxNewTokens": 8}, "groupSize": 4, "rewards": list(rewards)}}
    changes = {
        "method": method,
        "training.maxSteps": steps,
        "training.globalBatchSize": 8,
        "training.microBatchSize": 8,
    }
    return online.plan("grpo", changes, evaluated=False)


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"function": {"call": f"{MODULE}:{name}", **fields}}


def test_a_policy_learns_from_rewards_of_every_kind_at_once(online: OnlineWorld, tmp_path: Path) -> None:
    judged = JudgedWorld.at(tmp_path / "judged")
    judged.train(judged.plan("reward", {"training.maxSteps": 2}), tmp_path / "judge")
    plan = grpo(
        online,
        function("length") | {"weight": 0.1},
        {"metric": {"kind": "rouge-l"}, "weight": 3.0},
        {"name": "has_a", "metric": {"kind": "regex", "pattern": "a"}},
        {"model": {"source": (tmp_path / "judge" / "artifact").as_uri()}, "weight": -2.0},
    )
    online.train(plan, tmp_path / "run")
    weights = {"length": 0.1, "rouge_l": 3.0, "has_a": 1.0, "model": -2.0}
    for figures in online.figures(tmp_path / "run"):
        parts = sum(weight * figures[f"reward/{name}"] for name, weight in weights.items())
        assert figures["reward"] == pytest.approx(parts, rel=1e-4)


def test_a_function_that_hangs_once_costs_one_iteration_its_lesson(
    online: OnlineWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"folder": str(tmp_path)}
    hangs = function("hangs_once", timeoutSeconds=10, settings=settings)  # the calls after it must not take so long
    with caplog.at_level(logging.WARNING):
        online.train(grpo(online, hangs), tmp_path / "run")
    rewards = online.curve(tmp_path / "run", "reward")
    assert len(rewards) == 2
    assert all(math.isfinite(reward) and reward > 0 for reward in rewards)
    assert online.curve(tmp_path / "run", "steps_left_out") == [1, 0, 0]
    assert len(online.curve(tmp_path / "run", "grad_norm")) == 2, "nothing is learned from answers without any reward"
    assert online.curve(tmp_path / "run", "reward_errors/hangs_once") == [1, 0, 0]
    assert "Reward hangs_once: 8 of 8 answers have no score: it took longer than 10 s" in caplog.messages


def test_a_function_that_fails_for_some_answers_ends_nothing(online: OnlineWorld, tmp_path: Path) -> None:
    online.train(grpo(online, function("raises_for_short", settings={"least": 12})), tmp_path / "run")
    assert all(math.isfinite(loss) for loss in online.curve(tmp_path / "run", "loss"))
    failed = online.curve(tmp_path / "run", "reward_errors/raises_for_short")
    assert failed
    assert all(0 < share < 1 for share in failed)


def test_having_no_opinion_is_no_failure(online: OnlineWorld, tmp_path: Path) -> None:
    online.train(grpo(online, function("length"), function("no_opinion_of_short", settings={"least": 12})), tmp_path)
    silent = online.curve(tmp_path, "reward_no_opinion/no_opinion_of_short")
    assert silent
    assert all(0 < share < 1 for share in silent)
    assert online.curve(tmp_path, "reward_errors/no_opinion_of_short") == []


def test_a_function_that_always_fails_ends_the_run_as_the_users_mistake(online: OnlineWorld, tmp_path: Path) -> None:
    outcome = online.world.train(grpo(online, function("always_raises"), steps=20), tmp_path / "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    assert outcome.failure.message.startswith(
        "spec.method.grpo.rewards[0].function: gave no score to 8 of 8 answers, and to most in 3 calls in a row:"
        " KeyError: 'never' (sample_rewards.py:"
    )


def checked(online: OnlineWorld, folder: Path, data: dict[str, Any], *rewards: dict[str, Any]) -> Outcome:
    """What `finetune validate --data` finds."""
    plan = online.plan("grpo", {"method": {"grpo": COMMON | {"groupSize": 4, "rewards": list(rewards)}}, "data": data})
    return check(plan, folder / "check", online.world.cache)


def prompts(file: Path, **columns: str) -> dict[str, str]:
    file.write_text("".join(json.dumps({"prompt": "the cat", **columns}) + "\n" for _ in range(4)))
    return {"source": file.as_uri()}


def test_columns_that_no_row_has_are_told_before_anything_is_trained(online: OnlineWorld, tmp_path: Path) -> None:
    data = {
        "train": [prompts(tmp_path / "train.jsonl", answer="cat", topic="animals")],
        "eval": [prompts(tmp_path / "eval.jsonl", answers="cat")],
    }
    outcome = checked(
        online, tmp_path, data, {"metric": {"kind": "bleu", "column": "solution"}}, {"metric": {"kind": "bleu"}}
    )
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    told = [(problem.path, problem.value, problem.message) for problem in outcome.failure.problems]
    first, second = (f"spec.method.grpo.rewards[{index}].metric.column" for index in range(2))
    assert told == [
        (first, '"solution"', "needs column solution, which no row of spec.data.train has; they have: answer, topic"),
        (first, '"solution"', "needs column solution, which no row of spec.data.eval has; they have: answers"),
        (
            second,
            '"answer"',
            "needs column answer, which no row of spec.data.eval has; they have: answers; did you mean answers?",
        ),
    ]


def test_a_function_that_needs_a_column_which_no_row_has_is_told_too(online: OnlineWorld, tmp_path: Path) -> None:
    outcome = checked(online, tmp_path, {"train": [prompts(tmp_path / "train.jsonl")]}, function("matches"))
    assert outcome.failure is not None
    [problem] = outcome.failure.problems
    assert problem.path == "spec.method.grpo.rewards[0].function.call"
    assert problem.message == "needs column answer, which no row of spec.data.train has; they have: none"


def test_of_a_mixture_one_source_may_lack_the_column(online: OnlineWorld, tmp_path: Path) -> None:
    data = {"train": [prompts(tmp_path / "talk.jsonl"), prompts(tmp_path / "sums.jsonl", answer="7")]}
    assert checked(online, tmp_path, data, {"metric": {"kind": "bleu"}}).failure is None


def test_rewards_that_cannot_be_had_are_all_told_before_anything_is_loaded(online: OnlineWorld, tmp_path: Path) -> None:
    plan = grpo(online, function("no_such"), {"model": {"source": online.world.model.as_uri()}})
    outcome = online.world.train(plan, tmp_path / "run")
    assert outcome.failure is not None
    assert [problem.path for problem in outcome.failure.problems] == [
        "spec.method.grpo.rewards[0].function.call",
        "spec.method.grpo.rewards[1].model.source",
    ]
    assert not (tmp_path / "run" / "prepared.json").exists()
