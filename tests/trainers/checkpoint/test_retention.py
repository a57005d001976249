"""Rules add to what is kept, a quota takes away, and no policy loses the newest valid checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.retention import Best, Candidate, Retention, Verdict, choose

ids = st.builds(CheckpointId, epoch=st.integers(1, 4), step=st.integers(0, 40).map(lambda n: n * 5))
policies = st.builds(
    Retention,
    keep_last=st.none() | st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 60),
    keep_best=st.none()
    | st.builds(Best, metric=st.just("loss"), mode=st.sampled_from(["min", "max"]), count=st.integers(1, 3)),
    quota_bytes=st.none() | st.integers(1, 500),
)


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Candidate], CheckpointId]:
    """Checkpoints in any order, and which is the newest valid one."""
    found = draw(st.lists(ids, min_size=1, max_size=12, unique=True))
    losses = st.dictionaries(st.just("loss"), st.floats(0, 10), max_size=1)
    made = [Candidate(one, draw(st.integers(0, 100)), draw(losses), draw(st.booleans())) for one in found]
    return made, draw(st.sampled_from(found))


def kept(verdicts: list[Verdict]) -> set[CheckpointId]:
    return {verdict.id for verdict in verdicts if verdict.keep}


@given(runs(), policies)
def test_the_newest_valid_one_pinned_ones_and_those_in_use_always_stay(
    run: tuple[list[Candidate], CheckpointId], policy: Retention
) -> None:
    candidates, newest = run
    in_use = candidates[0].id
    stays = kept(choose(candidates, policy, [newest], protected=[in_use]))
    assert newest in stays
    assert in_use in stays
    assert {candidate.id for candidate in candidates if candidate.pinned} <= stays
    assert {candidate.id for candidate in candidates if candidate.id > newest} <= stays, "damaged: for a person to mend"


@given(runs(), policies)
def test_without_a_valid_one_everything_stays(run: tuple[list[Candidate], CheckpointId], policy: Retention) -> None:
    candidates, _ = run
    assert kept(choose(candidates, policy, [])) == {candidate.id for candidate in candidates}


@given(runs(), policies)
def test_each_checkpoint_has_one_verdict_with_a_reason_in_order(
    run: tuple[list[Candidate], CheckpointId], policy: Retention
) -> None:
    candidates, newest = run
    verdicts = choose(candidates, policy, [newest])
    assert [verdict.id for verdict in verdicts] == sorted((one.id for one in candidates), reverse=True)
    assert all(verdict.reasons for verdict in verdicts)


@given(runs(), policies)
def test_a_quota_is_kept_unless_what_must_stay_is_larger(
    run: tuple[list[Candidate], CheckpointId], policy: Retention
) -> None:
    candidates, newest = run
    sizes = {candidate.id: candidate.bytes for candidate in candidates}
    verdicts = choose(candidates, policy, [newest])
    total = sum(sizes[one] for one in kept(verdicts))
    if policy.quota_bytes is not None and total > policy.quota_bytes:
        firm = {"the newest that is whole", "newer than the newest that is whole", "pinned"}
        for verdict in verdicts:
            assert not verdict.keep or firm & set(verdict.reasons), verdict
    without = kept(choose(candidates, policy.model_copy(update={"quota_bytes": None}), [newest]))
    assert kept(verdicts) <= without


@given(runs(), policies, st.randoms())
def test_the_order_in_which_checkpoints_are_listed_does_not_matter(
    run: tuple[list[Candidate], CheckpointId], policy: Retention, random: Any
) -> None:
    candidates, newest = run
    shuffled = list(candidates)
    random.shuffle(shuffled)
    assert choose(candidates, policy, [newest]) == choose(shuffled, policy, [newest])


@given(runs(), policies)
def test_deciding_again_after_deleting_deletes_nothing_more(
    run: tuple[list[Candidate], CheckpointId], policy: Retention
) -> None:
    candidates, newest = run
    stays = kept(choose(candidates, policy, [newest]))
    left = [candidate for candidate in candidates if candidate.id in stays]
    relaxed = policy.model_copy(update={"keep_best": None})  # of those that are left, others may be the best
    if policy.keep_best is None and policy.quota_bytes is None:
        assert kept(choose(left, relaxed, [newest])) == stays


def steps(*numbers: int, **changes: Any) -> list[Candidate]:
    return [Candidate(CheckpointId(1, step), 10, **changes) for step in numbers]


LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 1.0}
MEASURED = [Candidate(CheckpointId(1, step), 10, {"loss": loss}) for step, loss in LOSSES.items()]


@pytest.mark.parametrize(
    ("policy", "stays"),
    [
        (Retention(keep_last=2), {40, 50}),
        (Retention(keep_last=1, keep_every=20), {20, 40, 50}),
        (Retention(keep_last=1, keep_best=Best(metric="loss")), {50}),
        (Retention(keep_last=1, keep_best=Best(metric="loss", count=2)), {20, 50}),
        (Retention(keep_last=1, keep_best=Best(metric="loss", mode="max")), {10, 50}),
        (Retention(keep_last=1, keep_best=Best(metric="accuracy")), {50}),
        (Retention(keep_last=None), {10, 20, 30, 40, 50}),
        (Retention(keep_last=None, quota_bytes=30), {30, 40, 50}),
        (Retention(keep_last=5, quota_bytes=25), {40, 50}),
        (Retention(keep_last=5, quota_bytes=1), {50}),
        (Retention(keep_last=2, keep_every=10, quota_bytes=30), {30, 40, 50}),
        (Retention(keep_last=2, keep_best=Best(metric="loss", mode="max"), quota_bytes=20), {10, 50}),
    ],
)
def test_rules_keep_what_they_say(policy: Retention, stays: set[int]) -> None:
    assert {one.step for one in kept(choose(MEASURED, policy, [CheckpointId(1, 50)]))} == stays


def test_a_verdict_says_why() -> None:
    verdicts = choose(
        steps(10, 20, 30, 40), Retention(keep_last=2, keep_every=10, quota_bytes=30), [CheckpointId(1, 40)]
    )
    assert [verdict.reasons for verdict in verdicts] == [
        ("the newest that is whole", "one of the last 2", "at a multiple of 10 steps"),
        ("one of the last 2", "at a multiple of 10 steps"),
        ("at a multiple of 10 steps",),
        ("over the quota of 30 bytes",),
    ]


def test_damaged_ones_do_not_count_among_the_last() -> None:
    stays = kept(choose(steps(10, 20, 30, 40), Retention(keep_last=2), [CheckpointId(1, 20)]))
    assert {one.step for one in stays} == {10, 20, 30, 40}


def of_two_trainings() -> list[Candidate]:
    """One of another training had the best loss that there is."""
    before = [Candidate(CheckpointId(1, step), 10, {"loss": loss}, training=1) for step, loss in LOSSES.items()]
    now = [Candidate(CheckpointId(2, step), 10, {"loss": loss + 5}) for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0))]
    return before + now


WHOLE_OF_BOTH = [CheckpointId(1, 50), CheckpointId(2, 30)]


@pytest.mark.parametrize(
    ("policy", "before", "now"),
    [
        (Retention(keep_last=1), {50}, {30}),
        (Retention(keep_last=2), {40, 50}, {20, 30}),
        (Retention(keep_last=1, keep_best=Best(metric="loss", mode="max")), {10, 50}, {30}),
        (Retention(keep_last=1, keep_best=Best(metric="loss", count=2)), {20, 50}, {10, 20, 30}),
        (Retention(keep_last=3, quota_bytes=40), {50}, {10, 20, 30}),
        (Retention(keep_last=3, quota_bytes=1), {50}, {30}),
        (Retention(keep_last=2, drop_others=True), set(), {20, 30}),
    ],
)
def test_each_training_is_judged_alone_and_its_newest_stays(policy: Retention, before: set[int], now: set[int]) -> None:
    stays = kept(choose(of_two_trainings(), policy, WHOLE_OF_BOTH))
    assert {one.step for one in stays if one.epoch == 1} == before
    assert {one.step for one in stays if one.epoch == 2} == now


def test_nothing_of_another_training_is_dropped_while_the_newest_one_has_nothing_whole() -> None:
    policy = Retention(keep_last=1, drop_others=True)
    stays = kept(choose(of_two_trainings(), policy, [CheckpointId(1, 50)]))
    assert {one.step for one in stays if one.epoch == 1} == {50}
    assert {one.step for one in stays if one.epoch == 2} == {10, 20, 30}


def test_a_verdict_says_that_it_is_about_another_training() -> None:
    verdicts = choose(of_two_trainings(), Retention(keep_last=1), WHOLE_OF_BOTH)
    assert verdicts[3].reasons == ("the newest that is whole", "one of the last 1", "of another training")
    assert verdicts[4].reasons == ("no rule keeps it", "of another training")
