"""Learning from rollouts that another engine drew: what the difference is, and what is made of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.questions import Question
from finetune_trainers.methods.building import build_method
from finetune_trainers.online.correction import corrections
from finetune_trainers.online.episodes import Experience, Rollout, Said, packed
from finetune_trainers.worker import load
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import OnlineWorld

pytestmark = [pytest.mark.training, *WHEN_TRAINING]


def rollout(*engine_log_probs: float, drawn_by_policy: bool = False) -> Rollout:
    question = Question([1, 2], [{"role": "user", "content": "?"}], {}, 0, 0)
    theirs = None if drawn_by_policy else list(engine_log_probs)
    return Rollout(question, 0, [5] * len(engine_log_probs), True, "", 1.0, {}, theirs)


def test_tokens_count_by_how_likely_the_trainer_finds_them_up_to_twice() -> None:
    rollouts = [rollout(-1.0, -2.0), rollout(-3.0)]
    ours = [torch.tensor([-1.0, -2.5]), torch.tensor([-1.0])]
    weights, figures = corrections(rollouts, ours)
    assert [None if one is None else one.tolist() for one in weights] == [
        pytest.approx([1.0, math.exp(-0.5)]),
        [2.0],
    ]
    assert figures == {"rollout_gap": pytest.approx(2.5 / 3), "rollout_gap_max": 2.0}
    assert corrections([rollout(-1.0)], [torch.tensor([-4.0])])[1]["rollout_gap_max"] == 3.0


def test_what_the_policy_drew_needs_no_correction() -> None:
    assert corrections([rollout(-1.0, drawn_by_policy=True)], [None]) == ([None], {})


def test_weights_lie_as_the_tokens_do() -> None:
    ones = torch.ones(2)
    batch = packed([rollout(-1.0, -2.0)], [Said(ones, ones, importance=torch.tensor([0.5, 2.0]))])
    assert batch.importance is not None
    assert batch.importance.tolist() == [0.5, 2.0]


@pytest.mark.parametrize(("method", "place"), [("grpo", None), ("ppo", -2)])
def test_a_token_of_half_the_weight_has_half_the_loss(method: str, place: int | None, tmp_path: Path) -> None:
    online = OnlineWorld.at(tmp_path)
    plan = online.plan(method, evaluated=False)
    prepared = online.world.prepare(plan, tmp_path / "run")
    context = SingleProcessContext(plan, tmp_path / "run")
    _, engine = load(plan, prepared, context)
    built = build_method(plan, prepared, engine.module, context)
    batches = built.step(0)
    built.close()
    assert batches is not None
    batch = batches.micro_batches[0]
    assert isinstance(batch, Experience)
    assert batch.advantages is not None
    assert batch.importance is None
    both = (batch, replace(batch, importance=torch.full_like(batch.advantages, 0.5)))
    losses = [built.loss(engine.module, one) for one in both]
    whole, half = (float((one.total if place is None else one.sums[place]).detach()) for one in losses)
    assert whole != 0
    assert half == pytest.approx(whole / 2)
