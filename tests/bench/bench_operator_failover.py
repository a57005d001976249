"""How long jobs wait for another replica when the leader is killed, and when it is told to end.

    python -m tests.bench.bench_operator_failover [--runs 3]

Two replicas with the default lease of 15 seconds. A job is created the moment the leader is signalled; the time runs
until its RayJob is there. The goals: the lease and five seconds after SIGKILL, two seconds after SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time

from tests.bench.bench_operator_create import JOBS, RAY_JOBS
from tests.bench.common import busy, write_results
from tests.bench.control_plane import bench_server, run_operator, say
from tests.cluster.server import Server
from tests.control_plane.operators import Operator
from tests.factories import job_document

LEASE_SECONDS = 15
GOALS = {"SIGKILL": LEASE_SECONDS + 5.0, "SIGTERM": 2.0}


def fail_over(server: Server, how: signal.Signals, number: int) -> float:
    """Seconds from the signal to the RayJob of a job created right after it."""
    name = f"{how.name.lower()}-{number}"
    with run_operator(server, f"first-{name}") as first, run_operator(server, f"second-{name}") as second:
        for one in (first, second):
            _wait_ready(one)
        first.wait(lambda: first.leads or second.leads, "one to lead")
        leader, other = (first, second) if first.leads else (second, first)
        time.sleep(3)
        begin = time.monotonic()
        leader.process.process.send_signal(how)
        server.client.create(JOBS, job_document(name=name))
        other.wait(lambda: server.client.find(f"{RAY_JOBS}/{name}-1"), "the other to act")
        return time.monotonic() - begin


def _wait_ready(one: Operator) -> None:
    one.wait(lambda: one.ready, "both to be ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    num_runs, load = parser.parse_args().runs, busy()
    seconds: dict[str, list[float]] = {}
    with bench_server() as server:
        for how in (signal.SIGTERM, signal.SIGKILL):
            seconds[how.name] = [round(fail_over(server, how, number), 2) for number in range(num_runs)]
            say(f"{how.name}: {seconds[how.name]} s (goal {GOALS[how.name]:g} s)")
    medians = {how: statistics.median(found) for how, found in seconds.items()}
    write_results("operator_failover", {"goals": GOALS, "load_before": load, "seconds": seconds, "median": medians})
    return int(any(max(found) > GOALS[how] for how, found in seconds.items()))


if __name__ == "__main__":
    sys.exit(main())
