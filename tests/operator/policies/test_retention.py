"""What is kept after an attempt, and after the job."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune_api.spec import Lifecycle
from finetune_operator.policies.retention import (
    GRACE_SECONDS,
    cluster_kept_until,
    expires_at,
    superseded_plans,
    superseded_ray_jobs,
)
from finetune_operator.states import RayJobState, read_ray_job
from tests.operator.decide_factories import NOON


def ray_job(attempt: int, deleting: bool = False) -> RayJobState:
    metadata = {"name": f"j-{attempt}", "uid": f"u{attempt}"} | (
        {"deletionTimestamp": "2026-01-01"} if deleting else {}
    )
    return read_ray_job({"metadata": metadata})


def test_a_job_without_a_time_to_live_is_kept() -> None:
    assert expires_at(NOON, Lifecycle()) is None


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_job_goes_when_its_time_to_live_has_passed(seconds: int) -> None:
    assert expires_at(NOON, Lifecycle(ttl_seconds_after_finished=seconds)) == NOON + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("failed", "kept", "seconds"),
    [
        pytest.param(False, 3600, GRACE_SECONDS, id="a success keeps nothing"),
        pytest.param(True, 3600, 3600, id="a failure keeps its cluster as long as it was told"),
        pytest.param(True, 0, GRACE_SECONDS, id="a failure that was told nothing"),
    ],
)
def test_how_long_a_cluster_may_outlive_its_job(failed: bool, kept: int, seconds: int) -> None:
    lifecycle = Lifecycle(keep_failed_cluster_seconds=kept)
    assert cluster_kept_until(NOON, failed, lifecycle) == NOON + timedelta(seconds=seconds)


def test_all_earlier_ray_jobs_go_when_an_attempt_starts_unless_they_are_going_already() -> None:
    there = {3: ray_job(3), 1: ray_job(1), 2: ray_job(2, deleting=True)}
    assert [one.name for one in superseded_ray_jobs(there, 3)] == ["j-1"]


def test_all_other_plans_go_when_an_attempt_starts() -> None:
    assert superseded_plans([4, 1, 3, 2], 3) == [1, 2, 4]
