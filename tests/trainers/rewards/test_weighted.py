"""Several rewards as one number: weights, what a failure counts, and when there are too many of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest

from finetune_trainers.errors import UserError
from finetune_trainers.rewards import Episode, Fault, Scored, Scorer
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


def totals(rewards: WeightedRewards, *completions: str) -> list[float]:
    """Of answers that are all this rank's."""
    asked = episodes(completions)
    return rewards.totals(asked, rewards.score(asked))


@pytest.mark.parametrize("in_this_thread", [False, True])
def test_a_total_is_the_sum_of_all_rewards_each_times_its_weight(in_this_thread: bool) -> None:
    one, two = Told([1.0, 2.0]), Told([10.0, -4.0])
    rewards = WeightedRewards([named("one", one, 2.0, in_this_thread), named("two", two, -0.5)])
    asked = episodes(["a", "b"])
    opinions = rewards.score(asked)
    assert opinions == [{"one": 1.0, "two": 10.0}, {"one": 2.0, "two": -4.0}]
    assert rewards.totals(asked, opinions) == [2.0 - 5.0, 4.0 + 2.0]
    rewards.close()
    assert one.closed
    assert two.closed


def test_where_a_reward_fails_its_mean_over_the_other_answers_counts_beside_the_other_rewards() -> None:
    told = [named("one", Told([-6.0, "broke", -2.0]), 0.5), named("two", Told([1.0, 2.0, 3.0]))]
    rewards, asked = WeightedRewards(told), episodes(["a", "b", "c"])
    opinions = rewards.score(asked)
    assert [one["one"] for one in opinions] == [-6.0, Fault("broke"), -2.0]
    assert rewards.totals(asked, opinions) == [-3.0 + 1.0, -2.0 + 2.0, -1.0 + 3.0]


def test_answers_without_an_opinion_are_not_in_the_mean_that_stands_for_a_failure() -> None:
    told = [named("one", Told([3.0, "broke", None])), named("two", Told([1.0, 1.0, 1.0]))]
    assert totals(WeightedRewards(told), "a", "b", "c") == [4.0, 4.0, 1.0]


SAID: list[list[float | str | None]] = [[-6.0, "broke"], [-2.0, "broke"]]


def test_the_answers_of_other_ranks_are_among_the_others() -> None:
    ranks = [WeightedRewards([named("one", Told(said))]) for said in SAID]
    asked = episodes(["a", "b"])
    opinions = [one for rank in ranks for one in rank.score(asked)]
    for rank in ranks:
        found = rank.totals(asked * 2, opinions)
        assert [found[0], found[2]] == [-6.0, -2.0]
        assert math.isnan(found[1])
        assert math.isnan(found[3])


def test_where_no_reward_gives_a_score_nothing_is_known_of_the_answer() -> None:
    rewards = [named("one", Told(["broke", "broke", None, 1.0])), named("two", Told(["hung", None, None, 1.0]))]
    *unknown, last = totals(WeightedRewards(rewards), "a", "b", "c", "d")
    assert all(math.isnan(total) for total in unknown)
    assert last == 2.0


def test_a_reward_without_opinion_adds_nothing() -> None:
    rewards = [named("one", Told([5.0, None])), named("two", Told([1.0, 1.0]))]
    assert totals(WeightedRewards(rewards), "a", "b") == [6.0, 1.0]


def test_a_reward_that_fails_for_all_says_the_same_of_all() -> None:
    rewards = [named("one", Told(["broke", "broke"])), named("two", Told([1.0, 3.0]))]
    assert totals(WeightedRewards(rewards), "a", "b") == [1.0, 3.0]


def test_no_episodes_ask_nobody() -> None:
    assert totals(WeightedRewards([named("one", Told())])) == []


def test_failures_are_told_once_of_each_kind_and_by_one_rank(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[list[float | str | None]] = [["broke", 1.0, 1.0], ["broke", 1.0, 1.0], ["hung", 1.0, 1.0]]
    with caplog.at_level(logging.WARNING):
        for tells in (True, False):
            rewards = WeightedRewards([named("one", Told(*calls))], tells)
            for _ in calls:
                totals(rewards, "a", "b", "c")
    assert caplog.messages == [
        "Reward one: 1 of 3 answers have no score: broke",
        "Reward one: 1 of 3 answers have no score: hung",
    ]


def test_more_than_half_failing_call_after_call_ends_the_run_and_says_all() -> None:
    mostly: list[float | str | None] = ["broke", "broke", 1.0]
    rewards = WeightedRewards([named("one", Told(*[mostly] * MAX_BAD_CALLS))])
    for _ in range(MAX_BAD_CALLS - 1):
        totals(rewards, "a", "b", "c")
    with pytest.raises(UserError) as ended:
        totals(rewards, "a", "b", "c")
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
        totals(rewards, "a", "b")
