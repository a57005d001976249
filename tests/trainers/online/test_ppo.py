"""What PPO makes of an iteration, of numbers that a test gives it: no model, no ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from finetune_api.progress import Lesson
from finetune_api.spec import Ppo as PpoSettings
from finetune_trainers.data.questions import Question
from finetune_trainers.errors import NonFiniteLossError
from finetune_trainers.online.critic import _warm_up
from finetune_trainers.online.episodes import Rollout
from finetune_trainers.online.method import Judged, _check_finite
from finetune_trainers.online.ppo import Ppo
from finetune_trainers.tuning import TunedModel, UnfreezeSchedule

NOT_WHITE: dict[str, Any] = {"whitenAdvantages": False, "gaeLambda": 1.0}


def ppo(**settings: Any) -> Ppo:
    rewards = [{"metric": {"kind": "exact-match"}}]
    context = SimpleNamespace(rank=0, world_size=1, report=lambda *_, **figures: None)
    parts = SimpleNamespace(context=context, batch=SimpleNamespace(global_batch_size=4))
    return Ppo(PpoSettings.model_validate({"rewards": rewards} | NOT_WHITE | settings), cast(Any, parts))


def rollout(reward: float, num_tokens: int = 1) -> Rollout:
    question = Question([1, 2], [{"role": "user", "content": "?"}], {}, 0, 0)
    return Rollout(question, 0, [5] * num_tokens, True, "", reward, {})


def judged(num_tokens: int, nats: float = 0.0) -> Judged:
    """Every token is so many nats from the reference, and the critic says nothing."""
    log_probs = torch.full((num_tokens,), -1.0)
    return Judged(log_probs, log_probs - nats, torch.zeros(num_tokens))


def test_the_price_follows_the_distance_of_whole_answers() -> None:
    method = ppo(kl={"coefficient": 0.1, "target": 6.0, "horizon": 2})
    rollouts = [rollout(0.0, 3), rollout(0.0, 1)]
    method._weigh(rollouts, [judged(3, 3.0), judged(1, 3.0)])
    assert method.state()["kl"]["coefficient"] == pytest.approx(0.1), "9 and 3 nats an answer are the target"
    method._weigh(rollouts, [judged(3, 6.0), judged(1, 6.0)])
    assert method.state()["kl"]["coefficient"] == pytest.approx(0.12)


def test_an_answer_without_a_score_is_learned_from_as_an_average_one() -> None:
    rollouts = [rollout(1.0), rollout(float("nan")), rollout(3.0)]
    said, _ = ppo(kl={"coefficient": 0.0})._weigh(rollouts, [judged(1)] * 3)
    assert [one.advantages.tolist() for one in said] == [[1.0], [2.0], [3.0]]


def test_a_stop_is_of_one_iteration() -> None:
    method = ppo(stopKl=0.1)
    method._figures([0.0, 0.2, 0.0, 0.0, 0.0, 1.0])
    method._figures([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert method._is_to_stop(), "also when a later step would be near again"
    method._weigh([rollout(1.0)] * 2, [judged(1)] * 2)
    assert not method._is_to_stop()


@pytest.mark.parametrize("who", ["policy", "reference", "critic"])
def test_whoever_says_what_is_no_number_is_named(who: str) -> None:
    fine = torch.zeros(2)
    said = {name: torch.tensor([0.0, torch.nan]) if name == who else fine for name in ("policy", "reference", "critic")}
    with pytest.raises(NonFiniteLossError, match=f"what the {who} says of rollouts is no finite number after 3 steps"):
        _check_finite([Judged(fine, fine, fine), Judged(*said.values())], 3)


def test_a_lesson_is_told_after_three_in_a_row_and_taken_back_by_the_first_that_teaches() -> None:
    method = ppo()
    told = []
    for spread in (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0):
        method._tell_of_lesson({"reward_std": spread, "cut_off": 0.5})
        told.append(method.lasting().get("lesson"))
    good, bad = Lesson.REWARDS_DIFFER, Lesson.EQUAL_REWARDS
    assert told == [None, None, good, good, good, bad, good, good, good, good]


def test_parts_that_learn_late_do_not_learn_before_the_critic_has_warmed_up() -> None:
    late = UnfreezeSchedule([(0.25, ["early"]), (0.75, ["late"])])
    tuned = TunedModel(torch.nn.Identity(), trainable=["first", "early", "late"], unfreeze=late)
    settings = ppo(passes=1, miniBatches=4, critic={"warmupIterations": 2})._ppo
    schedule = _warm_up(tuned, settings, total_steps=16)
    assert schedule is not None
    assert schedule.groups == [(0.5, ["first"]), (0.5, ["early"]), (0.75, ["late"])]
