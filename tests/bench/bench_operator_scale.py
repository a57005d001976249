"""Thousands of jobs: memory, a restart until all has been looked at, writes when nothing changes, progress of many.

    python -m tests.bench.bench_operator_scale [--jobs 1000 5000] [--reporting 1000] [--seconds 60]

All jobs run: each has its RayJob and its ConfigMaps, as the operator made them. The goals are the project's own; there
is no peer that publishes such figures for Python.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from datetime import UTC, datetime
from typing import Any

from finetune_api.progress import Progress, Stage
from tests.bench.bench_operator_create import CONFIG_MAPS, JOBS, RAY_JOBS
from tests.bench.common import busy, write_results
from tests.bench.control_plane import Api, api_of, bench_server, rss_bytes, run_operator, say
from tests.cluster.server import Server
from tests.control_plane.operators import Operator
from tests.factories import job_document

GOALS: dict[str, Any] = {
    "memory_mb": {1000: 150, 5000: 400},
    "restart_seconds": 15.0,
    "status_writes_a_second": 70.0,
    "p99": 2.0,
}
FLOOR_SECONDS = 15.0
"""The trainers write their progress at most so often."""
_AT_ONCE = 32
_WRITES = ("POST", "PUT", "PATCH", "DELETE")


def report(step: int) -> dict[str, Any]:
    progress = Progress(stage=Stage.TRAINING, step=step, total_steps=10_000, updated_at=datetime.now(UTC))
    return {"data": {"attempt": "1", "progress.json": progress.model_dump_json(by_alias=True)}}


async def make_running(server: Server, names: list[str], num_before: int = 0) -> None:
    """Jobs, then what KubeRay and the trainers would write once they run. The operator must be there.

    `num_before` jobs run already.
    """
    async with api_of(server) as api:
        await api.each("POST", [(JOBS, job_document(name=name)) for name in names], _AT_ONCE)
        await _number_is(api, RAY_JOBS, num_before + len(names))
        await _number_is(api, CONFIG_MAPS, 2 * (num_before + len(names)))  # progress and plan, which pods wait for
        running = {"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}}
        await api.each("PATCH", [(f"{RAY_JOBS}/{n}-1/status", running) for n in names], _AT_ONCE, merge=True)
        await api.each("PATCH", [(f"{CONFIG_MAPS}/{n}-progress", report(1)) for n in names], _AT_ONCE, merge=True)


async def _number_is(api: Api, path: str, wanted: int) -> None:
    deadline = time.monotonic() + 900
    while True:
        listed = await api.send("GET", f"{path}?limit=1")
        if len(listed["items"]) + int(listed["metadata"].get("remainingItemCount") or 0) >= wanted:
            return
        if time.monotonic() > deadline:
            sys.exit(f"fewer than {wanted} objects at {path} after 15 minutes")
        await asyncio.sleep(1)


def writes(operator: Operator) -> float:
    """Requests that change something, the lease left out: the operator does not count those."""
    return sum(operator.metric("rest_client_requests_total", method=method) for method in _WRITES)


def is_idle(operator: Operator, jobs: int) -> bool:
    done = operator.metric("controller_runtime_reconcile_total")
    return (
        done >= jobs
        and operator.metric("workqueue_depth") == 0
        and operator.metric("controller_runtime_active_workers") == 0
    )


def settled(operator: Operator, jobs: int) -> None:
    """Waits until nothing has been written for ten seconds."""
    operator.wait(lambda: is_idle(operator, jobs), "the queue to be empty")
    before = -1.0
    while before != (before := writes(operator)):
        time.sleep(10)


def restarted(server: Server, jobs: int, seconds: float) -> dict[str, Any]:
    """A fresh process over jobs that all run: when its queue is empty, what it weighs, what it writes in `seconds`."""
    begin = time.monotonic()
    with run_operator(server, "restarted", "--no-leader-election") as operator:
        operator.wait(lambda: operator.ready, "the operator to be ready")
        ready = time.monotonic() - begin
        operator.wait(lambda: is_idle(operator, jobs), "the queue to be empty")
        empty = time.monotonic() - begin
        settled(operator, jobs)
        before, passes = writes(operator), operator.metric("controller_runtime_reconcile_total")
        time.sleep(seconds)
        return {
            "ready_seconds": round(ready, 2),
            "queue_empty_seconds": round(empty, 2),
            "writes_when_nothing_changes": writes(operator) - before,
            "passes_when_nothing_changes": operator.metric("controller_runtime_reconcile_total") - passes,
            "in_seconds": seconds,
            "rss_mb": round(rss_bytes(operator.process) / 1e6),
        }


def buckets(operator: Operator) -> dict[float, float]:
    """The histogram of the time that keys waited in the queue: how many waited no longer than so many seconds."""
    page = operator.metrics()
    found: dict[float, float] = {}
    for line in page.splitlines():
        if line.startswith("workqueue_queue_duration_seconds_bucket"):
            edge = line.split('le="')[1].split('"')[0]
            found[float(edge)] = found.get(float(edge), 0.0) + float(line.rpartition(" ")[2])
    return found


def reporting(server: Server, names: list[str], seconds: float) -> dict[str, Any]:
    """Every job reports at the floor: how often a status is written, and how long keys wait."""
    with run_operator(server, "reporting", "--no-leader-election") as operator:
        settled(operator, len(names))
        before, begun, edges = writes(operator), time.monotonic(), buckets(operator)
        asyncio.run(_report_all(server, names, seconds))
        took = time.monotonic() - begun
        after = buckets(operator)
        waited = {edge: after[edge] - edges.get(edge, 0.0) for edge in sorted(after)}
        p99 = next(edge for edge, count in waited.items() if count >= 0.99 * waited[float("inf")])
        return {
            "reports_a_second": round(len(names) / FLOOR_SECONDS, 1),
            "status_writes_a_second": round((writes(operator) - before) / took, 1),
            "queue_p99_at_most_seconds": p99,
            "rss_mb": round(rss_bytes(operator.process) / 1e6),
        }


async def _report_all(server: Server, names: list[str], seconds: float) -> None:
    async with api_of(server) as api, asyncio.TaskGroup() as tasks:
        begin, step = time.monotonic(), 2
        while time.monotonic() - begin < seconds:
            for number, name in enumerate(names):
                due = begin + (step - 2) * FLOOR_SECONDS + number * FLOOR_SECONDS / len(names)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(api.send("PATCH", f"{CONFIG_MAPS}/{name}-progress", report(step), merge=True))
            step += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", type=int, default=[1000, 5000])
    parser.add_argument("--reporting", type=int, default=1000, help="jobs that report at the floor")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long nothing changes, and how long all report")
    options = parser.parse_args()
    results: dict[str, Any] = {"goals": GOALS, "load_before": busy()}
    with bench_server() as server:
        names: list[str] = []
        for jobs in sorted(options.jobs):
            with run_operator(server, "filling", "--no-leader-election") as operator:
                new = [f"job-{number}" for number in range(len(names), jobs)]
                asyncio.run(make_running(server, new, len(names)))
                names += new
                settled(operator, len(new))
            results[f"{jobs} jobs"] = restarted(server, jobs, options.seconds)
            say(f"{jobs} jobs: {results[f'{jobs} jobs']}")
            if jobs >= options.reporting and "reporting" not in results:
                results["reporting"] = reporting(server, names[: options.reporting], options.seconds)
                say(f"{options.reporting} of {jobs} jobs report: {results['reporting']}")
    write_results("operator_scale", results)
    return int(not _met(results, options.jobs))


def _met(results: dict[str, Any], numbers: list[int]) -> bool:
    of = {jobs: results[f"{jobs} jobs"] for jobs in numbers}
    memory = all(of[jobs]["rss_mb"] <= GOALS["memory_mb"].get(jobs, 1e9) for jobs in numbers)
    quick = all(found["queue_empty_seconds"] <= GOALS["restart_seconds"] for found in of.values())
    quiet = all(found["writes_when_nothing_changes"] == 0 for found in of.values())
    many = results.get("reporting", {})
    coalesced = many.get("status_writes_a_second", 0) <= GOALS["status_writes_a_second"]
    return memory and quick and quiet and coalesced and many.get("queue_p99_at_most_seconds", 0) <= GOALS["p99"]


if __name__ == "__main__":
    sys.exit(main())
