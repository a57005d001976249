"""Several rewards as one number: weights, what a failure counts, and when there are too many of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest

from finetune_trainers.errors import UserError
from finetune_trainers.rewards import Episode, Scored, Scorer
from finetune_trainers.rewards.weighted import MAX_BAD_CALLS, NamedScorer, WeightedRewards
from tests.trainers.rewards.worlds import episodes


class Told:
    """A reward that says what the test told it: for each call a number, None, or the text of a failure for each
    episode."""

    def __init__(self, *calls: Sequence[float | str | None]) -> None:
        self._calls = list(calls)
        self.closed = False

    def score(self, episodes: Sequence[Episode]) -> Scored:
        told = self._calls.pop(0)
        assert len(told) == len(episodes)
        faults = {index: one for index, one in enumerate(told) if isinstance(one, str)}
        return Scored([None if isinstance(one, str) else one for one in told], faults)

    def close(self) -> None:
        self.closed = True


def named(name: str, scorer: Scorer, weight: float = 1.0, in_this_thread: bool = False) -> NamedScorer:
    return NamedScorer(name, f"spec.method.grpo.rewards.{name}", weight, scorer, in_this_thread)


@pytest.mark.parametrize("in_this_thread", [False, True])
def test_a_total_is_the_sum_of_all_rewards_each_times_its_weight(in_this_thread: bool) -> None:
    one, two = Told([1.0, 2.0]), Told([10.0, -4.0])
    rewards = WeightedRewards([named("one", one, 2.0, in_this_thread), named("two", two, -0.5)])
    scores = rewards.score(episodes(["a", "b"]))
    assert scores.totals == [2.0 - 5.0, 4.0 + 2.0]
    assert scores.by_name == {"one": [1.0, 2.0], "two": [10.0, -4.0]}
    assert scores.num_errors == {"one": 0, "two": 0}
    rewards.close()
    assert one.closed
    assert two.closed


def test_where_a_reward_fails_its_mean_over_the_other_answers_counts_beside_the_other_rewards() -> None:
    rewards = [named("one", Told([-6.0, "broke", -2.0]), 0.5), named("two", Told([1.0, 2.0, 3.0]))]
    scores = WeightedRewards(rewards).score(episodes(["a", "b", "c"]))
    assert scores.totals == [-3.0 + 1.0, -2.0 + 2.0, -1.0 + 3.0]
    assert scores.by_name == {"one": [-6.0, None, -2.0], "two": [1.0, 2.0, 3.0]}
    assert scores.num_errors == {"one": 1, "two": 0}


def test_where_every_reward_fails_nothing_is_known_of_the_answer() -> None:
    rewards = [named("one", Told(["broke", "broke", 1.0])), named("two", Told(["hung", None, 1.0]))]
    first, *others = WeightedRewards(rewards).score(episodes(["a", "b", "c"])).totals
    assert math.isnan(first)
    assert others == [1.0, 2.0]


@pytest.mark.parametrize(("alone", "expected"), [(True, [0.0, 0.0]), (False, [math.nan, math.nan])])
def test_a_call_without_any_score_says_the_same_of_all_unless_other_ranks_know_more(
    alone: bool, expected: list[float]
) -> None:
    scores = WeightedRewards([named("one", Told(["broke", "broke"]))], alone).score(episodes(["a", "b"]))
    assert scores.totals == pytest.approx(expected, nan_ok=True)
    assert scores.num_errors == {"one": 2}


def test_a_reward_without_opinion_adds_nothing() -> None:
    rewards = [named("one", Told([5.0, None])), named("two", Told([1.0, 1.0]))]
    scores = WeightedRewards(rewards).score(episodes(["a", "b"]))
    assert scores.totals == [6.0, 1.0]
    assert scores.num_errors == {"one": 0, "two": 0}


def test_a_reward_that_fails_for_all_says_the_same_of_all() -> None:
    rewards = [named("one", Told(["broke", "broke"])), named("two", Told([1.0, 3.0]))]
    assert WeightedRewards(rewards).score(episodes(["a", "b"])).totals == [1.0, 3.0]


def test_no_episodes_ask_nobody() -> None:
    scores = WeightedRewards([named("one", Told())]).score([])
    assert scores == ([], {"one": []}, {"one": 0})


def test_failures_are_told_once_of_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    rewards = WeightedRewards([named("one", Told(["broke", 1.0, 1.0], ["broke", 1.0, 1.0], ["hung", 1.0, 1.0]))])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            rewards.score(episodes(["a", "b", "c"]))
    assert caplog.messages == [
        "Reward one: 1 of 3 answers have no score: broke",
        "Reward one: 1 of 3 answers have no score: hung",
    ]


def test_more_than_half_failing_call_after_call_ends_the_run_and_says_all() -> None:
    mostly: list[float | str | None] = ["broke", "broke", 1.0]
    rewards = WeightedRewards([named("one", Told(*[mostly] * MAX_BAD_CALLS))])
    for _ in range(MAX_BAD_CALLS - 1):
        rewards.score(episodes(["a", "b", "c"]))
    with pytest.raises(UserError) as ended:
        rewards.score(episodes(["a", "b", "c"]))
    [problem] = ended.value.problems
    assert problem.path == "spec.method.grpo.rewards.one"
    assert problem.message == (
        "gave no score to 2 of 3 answers, and to most in 3 calls in a row: broke;"
        ' for example for the answer "a" to "question 0"'
    )


@pytest.mark.parametrize("better", [["broke", 1.0], [1.0, 1.0]], ids=["half", "none"])
def test_a_better_call_in_between_begins_the_count_anew(better: list[float | str | None]) -> None:
    bad: list[float | str | None] = ["broke", "broke"]
    calls = [*[bad] * (MAX_BAD_CALLS - 1), better, *[bad] * (MAX_BAD_CALLS - 1)]
    rewards = WeightedRewards([named("one", Told(*calls))])
    for _ in calls:
        rewards.score(episodes(["a", "b"]))
