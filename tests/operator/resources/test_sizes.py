"""How large the pods are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.planning import plan_run
from finetune_operator.resources.sizes import Size, head_size, worker_size
from tests.factories import job, runtime


def worker(job_changes: dict[str, Any], runtime_changes: dict[str, Any] | None = None) -> Size:
    asked, pool = job(job_changes), runtime(runtime_changes or {})
    return worker_size(asked, plan_run(asked, pool), pool.spec)


@pytest.mark.parametrize(
    ("job_changes", "runtime_changes", "size"),
    [
        pytest.param({}, {}, Size(2, "8Gi", 0, "nvidia.com/gpu"), id="nobody says"),
        pytest.param({}, {"workers.gpus": 2}, Size(16, "64Gi", 2, "nvidia.com/gpu"), id="by the number of GPUs"),
        pytest.param({}, {"workers.cpus": 5, "workers.memory": "3Gi"}, Size(5, "3Gi", 0, "nvidia.com/gpu"), id="pool"),
        pytest.param(
            {"cluster.workers": {"cpus": 6, "memory": "4Gi"}},
            {"workers.cpus": 5, "workers.memory": "3Gi"},
            Size(6, "4Gi", 0, "nvidia.com/gpu"),
            id="the job before its pool",
        ),
        pytest.param({}, {"gpuResource": "amd.com/gpu"}, Size(2, "8Gi", 0, "amd.com/gpu"), id="another maker"),
    ],
)
def test_a_worker_is_as_large_as_the_job_says_or_its_pool_or_by_its_gpus(
    job_changes: dict[str, Any], runtime_changes: dict[str, Any], size: Size
) -> None:
    assert worker(job_changes, runtime_changes) == size


def test_the_head_is_as_large_as_the_job_says_or_its_pool() -> None:
    pool = runtime({"head": {"cpus": 3, "memory": "9Gi"}}).spec
    assert head_size(job(), runtime().spec) == Size(2, "8Gi")
    assert head_size(job(), pool) == Size(3, "9Gi")
    assert head_size(job({"cluster.head": {"memory": "1Gi"}}), pool) == Size(3, "1Gi")


def test_requests_are_limits_so_that_nobody_takes_memory_that_was_promised() -> None:
    resources = Size(1.5, "8Gi", 2, "nvidia.com/gpu").resources()
    assert resources["limits"] == {"cpu": "1500m", "memory": "8Gi", "nvidia.com/gpu": "2"}
    assert resources["requests"] == resources["limits"]


def test_a_pod_without_gpus_asks_for_none() -> None:
    assert Size(2, "8Gi", 0, "nvidia.com/gpu").resources()["limits"] == {"cpu": "2", "memory": "8Gi"}


@given(st.floats(min_value=0.0001, max_value=1024))
def test_cores_are_written_in_thousandths_at_the_finest(cpus: float) -> None:
    text = Size(cpus, "8Gi").resources()["limits"]["cpu"]
    written = int(text[:-1]) / 1000 if text.endswith("m") else int(text)
    assert written > 0
    assert written == pytest.approx(cpus, abs=0.001)


@pytest.mark.parametrize(
    ("memory", "shared"), [("8Gi", "4096Mi"), ("1Ti", "524288Mi"), ("513Mi", "256Mi"), ("1Mi", "64Mi")]
)
def test_shared_memory_may_take_half_of_the_pods(memory: str, shared: str) -> None:
    assert Size(1, memory).shared_memory == shared


@pytest.mark.parametrize(("cpus", "gpus", "threads"), [(96, 8, 12), (4, 0, 4), (0.5, 0, 1), (4, 8, 1)])
def test_processes_of_a_pod_share_its_cores(cpus: float, gpus: int, threads: int) -> None:
    assert Size(cpus, "8Gi", gpus).threads == threads
