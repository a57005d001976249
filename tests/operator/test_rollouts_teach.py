"""RolloutsTeach: whether there is anything to learn from what the model writes."""

from __future__ import annotations

import pytest

from finetune_api.progress import Lesson
from tests.operator.decide_factories import Cluster

NAME = "RolloutsTeach"


def training(*lessons: Lesson | None) -> Cluster:
    """A job whose first attempt has told of `lessons`, one after the other."""
    cluster = Cluster()
    cluster.settle()
    cluster.running().settle()
    for step, lesson in enumerate(lessons, 1):
        cluster.wait(60).report(step=step, lesson=lesson).settle()
    return cluster


def test_until_it_is_known_nothing_is_said_of_it() -> None:
    assert training(None).holds(NAME) is None


@pytest.mark.parametrize("lesson", [Lesson.EQUAL_REWARDS, Lesson.ALL_CUT_OFF])
def test_it_is_false_while_nothing_is_learned_and_says_what_can_be_done(lesson: Lesson) -> None:
    cluster = training(Lesson.REWARDS_DIFFER, lesson)
    assert cluster.holds(NAME) == ("False", lesson)
    assert "sampling.maxNewTokens" in cluster.says(NAME)
    cluster.wait(60).report(step=3, lesson=Lesson.REWARDS_DIFFER).settle()
    assert cluster.holds(NAME) == ("True", "RewardsDiffer")


def test_people_hear_when_it_changes() -> None:
    cluster = training(Lesson.EQUAL_REWARDS, Lesson.EQUAL_REWARDS, Lesson.REWARDS_DIFFER, Lesson.REWARDS_DIFFER)
    told = [reason for reason in cluster.events if reason in set(Lesson)]
    assert told == ["EqualRewards", "RewardsDiffer"]
