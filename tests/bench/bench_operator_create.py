"""How soon, and how fast, jobs become RayJobs; beside Kubeflow Trainer, whose TrainJobs become JobSets.

    python -m tests.bench.bench_operator_create [--jobs 1000] [--rate 20]

The same API server, the same number of objects, one controller after the other, both with their default settings. Twice
each: offered at a steady rate, which gives the delay of one job, and all at once, which gives jobs per second.
Trainer's webhooks are on, as it is shipped. Ours makes the RayJob first and then six more objects, of which the plan is
the last, Trainer none but the JobSet: how many jobs per second have all of it is told as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import psutil

from tests.bench.common import busy, write_results
from tests.bench.control_plane import (
    NAMESPACE,
    Api,
    api_of,
    bench_server,
    namespace_of,
    quantile,
    rss_bytes,
    run_operator,
    say,
    watched,
)
from tests.cluster.build import files_path, program_path
from tests.cluster.kubeflow_trainer import TRAIN_JOBS, kubeflow_trainer, train_job
from tests.cluster.server import Server
from tests.factories import job_document

GOAL_SECONDS = 1.0
_AT_ONCE = 32
_PATIENCE = 600.0
JOBS = f"/apis/finetune-operator.io/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
RAY_JOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"


async def offered(
    api: Api, jobs: str, ends: dict[str, Callable[[str], str]], make: Callable[[str], Any], num: int, rate: float
) -> list[float]:
    """Seconds from a job's creation to its first child's appearance, of `num` jobs offered at `rate` a second.

    Returns when all that `ends` names is there (see `at_once`): what comes next finds the controller at rest.
    """
    names = [f"rate-{number}" for number in range(num)]
    async with AsyncExitStack() as watches:
        seen = [await watches.enter_async_context(watched(api, path)) for path in ends]
        created = await api.at_rate([(name, jobs, make(name)) for name in names], rate)
        for found, name_of in zip(seen, ends.values(), strict=True):
            await _all_there(found, [name_of(name) for name in names])
    child_of = next(iter(ends.values()))
    return [max(0.0, seen[0][child_of(name)] - created[name]) for name in names]


async def at_once(
    api: Api, jobs: str, ends: dict[str, Callable[[str], str]], make: Callable[[str], Any], num: int
) -> tuple[list[float], float]:
    """Jobs per second of `num` jobs created as fast as they can be: from the first creation to the last object of each
    kind. `ends` gives the object's name by the job's, for each path that is watched. Then the milliseconds of processor
    time that all together spent on a job until its first object was there, which a busy machine changes less."""
    names = [f"burst-{number}" for number in range(num)]
    async with AsyncExitStack() as watches:
        seen = [await watches.enter_async_context(watched(api, path)) for path in ends]
        begin, used = time.monotonic(), sum(cpu_seconds().values())
        await api.each("POST", [(jobs, make(name)) for name in names], _AT_ONCE)
        rates = []
        spent = 0.0
        for found, name_of in zip(seen, ends.values(), strict=True):
            wanted = [name_of(name) for name in names]
            await _all_there(found, wanted)
            rates.append(num / (max(found[name] for name in wanted) - begin))
            spent = spent or sum(cpu_seconds().values()) - used
        return rates, 1000 * spent / num


async def _all_there(seen: dict[str, float], names: list[str]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not seen.keys() >= set(names):
        if time.monotonic() > deadline:
            sys.exit(f"after {_PATIENCE:.0f} s {len(set(names) - seen.keys())} of {len(names)} children are missing")
        await asyncio.sleep(0.2)


async def measure(
    server: Server, jobs: str, ends: dict[str, Callable[[str], str]], make: Callable[[str], Any], options: Any
) -> dict[str, Any]:
    """`ends`: see `at_once`; the first is the child that counts."""
    async with api_of(server) as api:
        load = busy()
        delays = await offered(api, jobs, ends, make, options.jobs, options.rate)
        per_second, spent = await at_once(api, jobs, ends, make, options.jobs)
    return {
        "load_before": load,
        "cpu_seconds": cpu_seconds(),
        "p50_seconds": round(quantile(delays, 0.5), 4),
        "p99_seconds": round(quantile(delays, 0.99), 4),
        "max_seconds": round(max(delays), 4),
        "jobs_per_second_at_once": round(per_second[0], 1),
        "jobs_per_second_with_all_they_need": round(per_second[-1], 1),
        "cpu_milliseconds_a_job_at_once": round(spent, 1),
        "delays": [round(delay, 4) for delay in delays],
    }


def cpu_seconds() -> dict[str, float]:
    """What each process used so far: the load (this one), the API server, its store and the controller."""
    used: dict[str, float] = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times, name = process.cpu_times(), process.name() if process.pid != os.getpid() else "load"
        used[name] = round(used.get(name, 0.0) + times.user + times.system, 1)
    return used


def ours(options: Any) -> dict[str, Any]:
    with bench_server() as server, run_operator(server, "operator") as operator:
        operator.wait(lambda: operator.ready and operator.leads, "the operator to lead")
        ends: dict[str, Callable[[str], str]] = {RAY_JOBS: lambda n: f"{n}-1", CONFIG_MAPS: lambda n: f"{n}-1-plan"}
        figures = asyncio.run(measure(server, JOBS, ends, lambda n: job_document(name=n), options))
        figures["operator_rss_mb"] = round(rss_bytes(operator.process) / 1e6)
        return figures


def theirs(options: Any) -> dict[str, Any]:
    programs = program_path("kubeflow-trainer", say)
    manifests, jobset = files_path("kubeflow-trainer-manifests", say), files_path("jobset-manifests", say)
    namespace = "bench-trainer"
    jobs = TRAIN_JOBS.format(namespace=namespace)
    children = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets"
    with bench_server() as server, kubeflow_trainer(programs, manifests, jobset, server) as controller:
        namespace_of(server, namespace)
        figures = asyncio.run(measure(server, jobs, {children: lambda n: n}, train_job, options))
        figures["operator_rss_mb"] = round(rss_bytes(controller) / 1e6)
        return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=20.0, help="jobs offered a second")
    parser.add_argument("--only", choices=["ours", "kubeflow trainer"], help="one side; nothing is written then")
    options = parser.parse_args()
    sides = {"ours": ours, "kubeflow trainer": theirs}
    figures = {side: run(options) for side, run in sides.items() if options.only in (None, side)}
    for side, found in figures.items():
        say(
            f"{side:<17} p50 {found['p50_seconds']:.3f} s, p99 {found['p99_seconds']:.3f} s at {options.rate:g}/s;"
            f" {found['jobs_per_second_at_once']} jobs/s at once"
            f" ({found['jobs_per_second_with_all_they_need']} with all they need),"
            f" {found['cpu_milliseconds_a_job_at_once']} ms of processor time a job; {found['operator_rss_mb']} MB;"
            f" CPU seconds {found['cpu_seconds']}"
        )
    if options.only:
        return 0
    ratio = figures["ours"]["jobs_per_second_at_once"] / figures["kubeflow trainer"]["jobs_per_second_at_once"]
    write_results(
        "operator_create", {"jobs": options.jobs, "rate": options.rate, "ratio": round(ratio, 2), "figures": figures}
    )
    say(f"{ratio:.2f}x the jobs per second of Kubeflow Trainer (goal 1x)")
    return int(figures["ours"]["p99_seconds"] >= GOAL_SECONDS or ratio < 1)


if __name__ == "__main__":
    sys.exit(main())
