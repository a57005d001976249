"""The names under which dashboards made for Go controllers look, and the product's own."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finetune_operator.metrics import Metrics

CONTROLLER_RUNTIME = [
    "controller_runtime_active_workers",
    "controller_runtime_max_concurrent_reconciles",
    "controller_runtime_reconcile_errors_total",
    "controller_runtime_reconcile_time_seconds",
    "controller_runtime_reconcile_timeouts_total",
    "controller_runtime_reconcile_total",
    "leader_election_master_status",
    "rest_client_request_duration_seconds",
    "rest_client_requests_total",
    "workqueue_adds_total",
    "workqueue_depth",
    "workqueue_longest_running_processor_seconds",
    "workqueue_queue_duration_seconds",
    "workqueue_retries_total",
    "workqueue_unfinished_work_seconds",
    "workqueue_work_duration_seconds",
]


def samples(metrics: Metrics) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """What the page shows, by name and labels."""
    shown: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            shown.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return shown


@pytest.mark.parametrize("name", CONTROLLER_RUNTIME)
def test_names_are_those_of_controller_runtime(name: str) -> None:
    assert f"# TYPE {name} " in Metrics().render().decode()


def test_jobs_are_counted_when_they_are_read() -> None:
    metrics = Metrics()
    counts = {("Running", "sft"): 3, ("Failed", "ppo"): 1}
    metrics.count_jobs_with(lambda: counts)
    assert samples(metrics)["finetune_jobs"] == {
        (("method", "ppo"), ("phase", "Failed")): 1,
        (("method", "sft"), ("phase", "Running")): 3,
    }
    del counts["Failed", "ppo"]
    assert len(samples(metrics)["finetune_jobs"]) == 1


def test_attempts_first_steps_and_goodput_are_shown() -> None:
    metrics = Metrics()
    metrics.attempts.labels("NodeLost").inc()
    metrics.first_step_seconds.observe(95)
    metrics.goodput.observe(0.97)
    shown = samples(metrics)
    assert shown["finetune_attempts_total"] == {(("outcome", "NodeLost"),): 1}
    assert shown["finetune_time_to_first_step_seconds_bucket"][("le", "60.0"),] == 0
    assert shown["finetune_time_to_first_step_seconds_bucket"][("le", "120.0"),] == 1
    assert shown["finetune_goodput_ratio_bucket"][("le", "0.98"),] == 1


def test_two_operators_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.attempts.labels("Succeeded").inc()
    assert "finetune_attempts_total" not in samples(two)


def test_the_process_itself_is_measured() -> None:
    assert samples(Metrics())["process_resident_memory_bytes"][()] > 0
