"""RolloutFaithful: whether the engine that writes rollouts is near enough to the model that learns from them."""

from __future__ import annotations

from finetune_api.progress import Progress, RolloutGap, Stage
from finetune_operator.conditions import rollout_faithful
from tests.operator.decide_factories import NOON, Cluster, succeeded

NAME = "RolloutFaithful"
NEAR, FAR = RolloutGap(nats=0.001, limit=0.05), RolloutGap(nats=0.3, limit=0.05)
UNDER, OVER = ("True", "GapWithinLimit"), ("False", "GapOverLimit")


def training(gap: RolloutGap | None) -> Cluster:
    """A job whose first attempt trains."""
    cluster = Cluster()
    cluster.settle()
    cluster.running().wait(60).report(step=1, rollout_gap=gap).settle()
    return cluster


def goes_on(cluster: Cluster, gap: RolloutGap | None) -> Cluster:
    cluster.wait(60).report(step=2, rollout_gap=gap).settle()
    return cluster


def test_where_the_policy_itself_writes_nothing_is_said_of_it() -> None:
    assert training(None).holds(NAME) is None


def test_it_is_false_while_the_gap_is_over_its_limit_and_says_what_can_be_done() -> None:
    cluster = training(FAR)
    assert cluster.holds(NAME) == OVER
    assert "differ by 0.3 nats per token, and gapLimit is 0.05" in cluster.says(NAME)
    assert "fp32" in cluster.says(NAME)
    assert goes_on(cluster, NEAR).holds(NAME) == UNDER
    assert cluster.says(NAME) == "vLLM and the trainer differ by 0.001 nats per token; gapLimit is 0.05."
    assert goes_on(cluster, FAR).holds(NAME) == OVER


def test_people_hear_when_the_limit_is_crossed_and_not_of_each_figure() -> None:
    cluster = training(NEAR)
    for gap in (FAR, RolloutGap(nats=0.4, limit=0.05), NEAR, RolloutGap(nats=0.002, limit=0.05)):
        goes_on(cluster, gap)
    assert [reason for reason in cluster.events if reason.startswith("Gap")] == ["GapOverLimit", "GapWithinLimit"]


def test_it_stands_when_the_job_has_ended() -> None:
    cluster = training(FAR)
    cluster.outcome(succeeded()).ended("SUCCEEDED").settle()
    assert cluster.holds("Complete") is not None
    assert cluster.holds(NAME) == OVER


def test_a_gap_at_the_limit_is_not_over_it_and_one_that_was_not_measured_is() -> None:
    for gap, status in ((RolloutGap(nats=0.05, limit=0.05), "True"), (RolloutGap(limit=0.05), "False")):
        (finding,) = rollout_faithful(Progress(stage=Stage.TRAINING, updated_at=NOON, rollout_gap=gap))
        assert finding.status == status
