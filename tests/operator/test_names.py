"""Names and labels: deterministic, short enough, and never the same for two different things."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.meta import NAME_MAX_LENGTH
from finetune_operator import names

JOBS = st.from_regex(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True)
ATTEMPTS = st.integers(min_value=1, max_value=999_999)


@given(job=JOBS, attempt=ATTEMPTS)
def test_the_longest_job_name_leaves_room_for_what_kuberay_appends(job: str, attempt: int) -> None:
    assert len(names.ray_job(job, attempt)) <= names.RAY_JOB_NAME_LENGTH


@given(job=JOBS, attempt=ATTEMPTS)
def test_an_attempt_is_read_back_from_its_labels(job: str, attempt: int) -> None:
    labels = names.pod_labels(job, attempt, names.WORKER)
    assert (names.job_of(labels), names.attempt_of(labels)) == (job, attempt)
    assert all(len(value) <= 63 for value in labels.values())


@given(st.sets(JOBS, min_size=2, max_size=6), st.sets(ATTEMPTS, min_size=1, max_size=3))
def test_no_two_jobs_and_attempts_share_a_name_of_one_kind(jobs: set[str], attempts: set[int]) -> None:
    for left, right in combinations(sorted(jobs), 2):
        assert names_of_kind(left, attempts) & names_of_kind(right, attempts) == set()


def test_a_job_that_is_named_like_another_ones_attempt_takes_nothing_from_it() -> None:
    attempts = set(range(1, 20))
    assert names_of_kind("bot", attempts) & names_of_kind("bot-1", attempts) == set()


def test_the_limit_of_a_job_name_is_the_one_that_names_are_made_for() -> None:
    assert len(names.ray_job("a" * NAME_MAX_LENGTH, 999_999)) == names.RAY_JOB_NAME_LENGTH


@pytest.mark.parametrize("labels", [None, [], "x", {}, {names.JOB_LABEL: 1, names.ATTEMPT_LABEL: 1}])
def test_what_is_no_label_of_ours_names_neither_job_nor_attempt(labels: Any) -> None:
    assert (names.job_of(labels), names.attempt_of(labels)) == (None, None)


@pytest.mark.parametrize("text", ["0", "01", "-1", "+1", " 1", "1 ", "1\n", "²", "١", "", "1" * 10, 1, None])
def test_only_a_plain_number_from_one_is_an_attempt(text: Any) -> None:
    assert names.attempt_from(text) is None


def test_the_selector_of_all_that_was_made_here_asks_for_manager_and_job() -> None:
    assert names.managed_selector() == "app.kubernetes.io/managed-by=finetune-operator,finetune-operator.io/job"


def names_of_kind(job: str, attempts: set[int]) -> set[tuple[str, str]]:
    per_attempt = {(kind, name(job, n)) for n in attempts for kind, name in PER_ATTEMPT}
    return per_attempt | {(kind, name(job)) for kind, name in PER_JOB}


PER_ATTEMPT = [("RayJob", names.ray_job), ("ConfigMap", names.plan_config_map)]
PER_JOB = [
    ("ConfigMap", names.runtime_config_map),
    ("ConfigMap", names.progress_config_map),
    ("ServiceAccount", names.trainer_account),
    ("NetworkPolicy", names.network_policy),
    ("PodDisruptionBudget", names.disruption_budget),
]
