"""What the operator counts and times, in Prometheus' form.

One `Metrics` is made in `__main__` and handed to whatever counts; `server` shows it at /metrics. The runtime's names
and buckets are those of controller-runtime and client-go, so dashboards made for Go controllers show this one too.
What begins with `finetune_` is the product's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "JobCounts", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

JobCounts = Callable[[], Mapping[tuple[str, str], int]]
"""Says how many jobs there are now, by (phase, method)."""

_QUEUE_SECONDS = [10.0**power for power in range(-8, 4)]
_RECONCILE_SECONDS = [
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *(1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5, 6, 7, 8, 9, 10, 15, 20, 25, 30, 40, 50, 60),
]
_REQUEST_SECONDS = [0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60]
_FIRST_STEP_SECONDS = [15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200]
_SHARES = [0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0]


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        """Every metric is there from the start; one with labels shows once a label has a value."""
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        self._queues()
        self._controllers()
        self._requests()
        self._reflectors()
        self._product()

    def render(self) -> bytes:
        """The page that Prometheus reads, as `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    def count_jobs_with(self, count: JobCounts) -> None:
        """`finetune_jobs` is counted afresh whenever it is read, so that it cannot drift. Called once."""
        self.registry.register(_Jobs(count))

    def _queues(self) -> None:
        labels = ("name", "controller")
        self.queue_depth = self._gauge("workqueue_depth", "Keys that wait for a worker", labels)
        self.queue_adds = self._counter("workqueue_adds", "Keys that became ready for a worker", labels)
        self.queue_retries = self._counter("workqueue_retries", "Keys added again after a failure", labels)
        self.queue_waited = self._histogram(
            "workqueue_queue_duration_seconds", "Time a key waited for a worker", labels, _QUEUE_SECONDS
        )
        self.queue_worked = self._histogram(
            "workqueue_work_duration_seconds", "Time a worker had a key", labels, _QUEUE_SECONDS
        )
        self.queue_unfinished = self._gauge(
            "workqueue_unfinished_work_seconds", "Sum of the times that keys in work have been so", labels
        )
        self.queue_longest = self._gauge(
            "workqueue_longest_running_processor_seconds",
            "The longest of the times that keys have been in work",
            labels,
        )

    def _controllers(self) -> None:
        labels = ("controller",)
        self.reconciles = self._counter("controller_runtime_reconcile", "Passes, by result", (*labels, "result"))
        self.reconcile_errors = self._counter("controller_runtime_reconcile_errors", "Passes that failed", labels)
        self.reconcile_timeouts = self._counter(
            "controller_runtime_reconcile_timeouts", "Passes that were cut off for taking too long", labels
        )
        self.reconcile_seconds = self._histogram(
            "controller_runtime_reconcile_time_seconds", "Duration of a pass", labels, _RECONCILE_SECONDS
        )
        self.max_workers = self._gauge("controller_runtime_max_concurrent_reconciles", "Workers there are", labels)
        self.active_workers = self._gauge("controller_runtime_active_workers", "Workers that have a key", labels)
        self.leader = self._gauge("leader_election_master_status", "1 where this process leads", ("name",))

    def _requests(self) -> None:
        self.requests = self._counter("rest_client_requests", "Answers of the API server", ("code", "method", "host"))
        self.request_seconds = self._histogram(
            "rest_client_request_duration_seconds", "Duration of a request", ("verb", "host"), _REQUEST_SECONDS
        )

    def _reflectors(self) -> None:
        labels = ("name",)
        self.lists = self._counter("reflector_lists", "Full lists of a kind", labels)
        self.watches = self._counter("reflector_watches", "Watches begun", labels)
        self.reflector_failures = self._counter("reflector_failures", "Lists and watches that failed", labels)
        self.stored = self._gauge("reflector_stored_objects", "Objects held in memory", labels)
        self.stale_seconds = self._gauge("reflector_stale_seconds", "Time since the last sign of life", labels)

    def _product(self) -> None:
        self.attempts = self._counter("finetune_attempts", "Attempts that ended, by outcome", ("outcome",))
        self.first_step_seconds = self._histogram(
            "finetune_time_to_first_step_seconds", "From a job's creation to its first step", (), _FIRST_STEP_SECONDS
        )
        self.goodput = self._histogram(
            "finetune_goodput_ratio", "Share of a job's running time that went into steps it kept", (), _SHARES
        )

    def _counter(self, name: str, says: str, labels: Iterable[str]) -> Counter:
        return Counter(name, says, labels, registry=self.registry)

    def _gauge(self, name: str, says: str, labels: Iterable[str]) -> Gauge:
        return Gauge(name, says, labels, registry=self.registry)

    def _histogram(self, name: str, says: str, labels: Iterable[str], buckets: Iterable[float]) -> Histogram:
        return Histogram(name, says, labels, buckets=tuple(buckets), registry=self.registry)


class _Jobs(Collector):
    """Counts jobs when asked."""

    def __init__(self, count: JobCounts) -> None:
        self._count = count

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [self._family()]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = self._family()
        for (phase, method), number in sorted(self._count().items()):
            family.add_metric([phase, method], number)
        return [family]

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily("finetune_jobs", "Jobs there are", labels=["phase", "method"])
