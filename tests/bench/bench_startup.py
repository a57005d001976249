"""Seconds from the command to the end of the first optimizer step: ours with Ray, TRL without, Ray's start alone.

    python -m tests.bench.bench_startup [--runs 3]

Nothing is cached on either side but the model's folder: rows are tokenized in each run. The first step is in both.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.common import busy, write_results
from tests.bench.sft_runs import ours, settings_for, trl

RAY_START = """
import ray
ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)

@ray.remote
class Worker:
    def ready(self):
        return True

ray.get(Worker.remote().ready.remote())
ray.shutdown()
"""


def ray_alone() -> float:
    """A process that starts Ray and one actor, and ends it: what any user of Ray pays."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", RAY_START], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    num_runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {"ours": [], "ours without Ray": [], "trl": [], "ray alone": []}
    loads = []
    with tempfile.TemporaryDirectory(prefix="bench-startup-") as name:
        folder = Path(name)
        settings = settings_for(folder, "fp32", steps=1)
        for number in range(num_runs):
            loads.append(busy())
            seconds["ours"].append(ours(settings, folder / f"ours-{number}", use_ray=True).seconds_to_first_step)
            seconds["trl"].append(trl(settings, folder / f"trl-{number}", "tuned").seconds_to_first_step)
            seconds["ours without Ray"].append(ours(settings, folder / f"alone-{number}").seconds_to_first_step)
            seconds["ray alone"].append(ray_alone())
            print({side: round(values[-1], 1) for side, values in seconds.items()}, flush=True)
    medians = {side: round(statistics.median(values), 2) for side, values in seconds.items()}
    allowed = medians["trl"] + medians["ray alone"]
    raw = {side: [round(value, 2) for value in values] for side, values in seconds.items()}
    write_results("startup", {"seconds": raw, "median_seconds": medians, "load_before": loads})
    print(f"ours {medians['ours']:.1f} s; TRL {medians['trl']:.1f} s + Ray's start {medians['ray alone']:.1f} s")
    return int(medians["ours"] > allowed)


if __name__ == "__main__":
    sys.exit(main())
