"""Decisions a second of processor time: observing and deciding, from the raw documents that the stores hold.

    python -m tests.bench.bench_decide [--seconds 3]

Four cases, each over many jobs of its own: a running job of which nothing changed; a running job with a new report and
a new version of its status, which is most of what a busy operator sees; a job that is done; and a new job, whose plan
and objects are built. The goal is for the steady state: nothing changed. The others are shown beside it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from finetune_api.progress import Stage
from finetune_operator import names
from finetune_operator.decide import Decision, decide
from finetune_operator.kinds import CONFIG_MAP
from finetune_operator.observe import World, observe
from tests.bench.common import busy, write_results
from tests.operator.decide_factories import SETTINGS, Cluster, succeeded

GOAL = 5000
JOBS = 200
RUNS = 5


def new(number: int) -> Cluster:
    """A job that was just created."""
    return Cluster({"cluster.workers.replicas": 2, "cluster.workers.gpus": 8}, name=f"job-{number}")


def running(number: int) -> Cluster:
    """A job that trains on two workers and a head."""
    cluster = new(number)
    cluster.settle()
    cluster.running()
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    for role, count in ((names.HEAD, 1), (names.WORKER, 2)):
        for index in range(count):
            cluster.pod(f"job-{number}-1-{role}-{index}", ready, role)
    cluster.wait(60).report(Stage.TRAINING, step=3, metrics={f"figure-{n}": 1.5 + n for n in range(8)}).settle()
    return cluster


def reported(number: int) -> Cluster:
    """The same with a report that the status does not show yet."""
    cluster = running(number)
    return cluster.wait(15).report(Stage.TRAINING, step=4, metrics={f"figure-{n}": 2.5 + n for n in range(8)})


def done(number: int) -> Cluster:
    """A job that succeeded."""
    cluster = running(number)
    cluster.outcome(succeeded()).ended("SUCCEEDED").settle()
    return cluster


def one(cluster: Cluster, world: World) -> Decision:
    """One decision, from raw documents."""
    return decide(world.job, observe(world), cluster.now, SETTINGS)


def renewed(world: World) -> World:
    """The same world as a watch brings it: new versions of the job and of its ConfigMaps."""
    config_maps = [dict(document) for document in world.children[CONFIG_MAP]]
    return replace(world, job=dict(world.job), children={**world.children, CONFIG_MAP: config_maps})


def rate(make: Callable[[int], Cluster], seconds: float, *, changing: bool = False) -> float:
    """Decisions a second: the median of a few runs over jobs of their own. `changing`: the job and its report are
    new each time."""
    cases = [(cluster, copy.deepcopy(cluster.world())) for cluster in map(make, range(JOBS))]
    rates = []
    for _ in range(RUNS):
        count, start = 0, time.process_time()
        while time.process_time() - start < seconds / RUNS:
            for cluster, world in cases:
                one(cluster, renewed(world) if changing else world)
            count += len(cases)
        rates.append(count / (time.process_time() - start))
    return statistics.median(rates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    seconds = parser.parse_args().seconds
    load = busy()
    rates = {
        "nothing changed": rate(running, seconds),
        "a new report": rate(reported, seconds, changing=True),
        "done": rate(done, seconds),
        "a new job": rate(new, seconds),
    }
    write_results("decide", {"decisions_per_second": {k: round(v) for k, v in rates.items()}, "load_before": load})
    for name, value in rates.items():
        print(f"{name:<16} {value:8,.0f} decisions/s")
    return int(rates["nothing changed"] < GOAL)


if __name__ == "__main__":
    raise SystemExit(main())
