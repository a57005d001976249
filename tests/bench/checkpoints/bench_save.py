"""How long training stands still for a checkpoint, how slow steps are while it is written, how fast it is durable.

    python -m tests.bench.checkpoints.bench_save [--layers 3] [--runs 7] [--ways ours dcp-thread ...]

One process per way of saving (`trainees`), all with the same model, of about 154 MB of state a layer; only one of them
works at a time, in turn. Blocked time is divided by that process's own median step with nothing else going on, and the
99th percentile of steps while a checkpoint is written by that of as many steps without: of fewer it would be lower by
chance alone. The durable rate is divided by a raw write and flush of as many bytes in the same round. Exit code 1 when
ours misses a goal.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.checkpoints.state import raw_write, timed
from tests.bench.checkpoints.trainees import WAYS, Trainee
from tests.bench.common import busy, write_results
from tests.bench.control_plane import quantile

GOALS = {"blocked": 0.10, "of the best peer": 0.5, "p99": 1.10, "durable": 0.85}
BYTES_PER_LAYER = 12 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
IDLE_STEPS = 5
"""At least, in a round."""


def measured(ways: list[str], layers: int, runs: int, folder: Path) -> tuple[dict[str, Any], list[float]]:
    """Raw figures by way, and seconds of the raw writes."""
    found: dict[str, Any] = {way: {"idle": [], "during": [], "blocked": [], "durable": []} for way in ways}
    raw: list[float] = []
    with contextlib.ExitStack() as stack:
        trainees = {way: stack.enter_context(Trainee(way, layers, folder / way)) for way in ways}
        for trainee in trainees.values():
            trainee("save")  # what is made once: buffers, processes, page tables
        for number in range(runs):
            raw.append(timed(lambda: raw_write(folder, layers * BYTES_PER_LAYER)))
            for way, trainee in trainees.items():
                figures = found[way]
                saved = trainee("save")
                figures["blocked"].append(saved["blocked"])
                figures["during"] += saved["steps"]
                figures["idle"] += trainee(f"steps {max(IDLE_STEPS, len(saved['steps']))}")["steps"]
                figures["durable"].append(trainee("durable")["seconds"])
            print(f"round {number + 1} of {runs}", flush=True)
    return found, raw


def summed_up(found: dict[str, Any], raw: list[float]) -> dict[str, dict[str, float]]:
    return {
        way: {
            "step": statistics.median(figures["idle"]),
            "blocked": statistics.median(figures["blocked"]) / statistics.median(figures["idle"]),
            "p99": quantile(figures["during"], 0.99) / quantile(figures["idle"], 0.99),
            "durable": statistics.median(raw) / statistics.median(figures["durable"]),
        }
        for way, figures in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="154 MB of state each")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one when left out")
    options = parser.parse_args()
    load = busy()
    with tempfile.TemporaryDirectory(prefix="bench-save-", dir=options.folder) as name:
        found, raw = measured(options.ways, options.layers, options.runs, Path(name))
    figures = summed_up(found, raw)
    for way, one in figures.items():
        print(
            f"{way:<12} step {one['step']:.2f} s, blocked {one['blocked']:.3f} of a step, p99 step while writing"
            f" {one['p99']:.2f}, durable {one['durable']:.2f} of a raw write"
        )
    results = {"load_before": load, "layers": options.layers, "goals": GOALS, "figures": figures}
    write_results("checkpoint_save", results | {"raw_write_seconds": raw, "seconds": found})
    if "ours" not in figures:
        return 0
    ours, peers = figures["ours"], [one["blocked"] for way, one in figures.items() if way != "ours"]
    return int(
        ours["blocked"] > min([GOALS["blocked"], *(GOALS["of the best peer"] * peer for peer in peers)])
        or ours["p99"] > GOALS["p99"]
        or ours["durable"] < GOALS["durable"]
    )


if __name__ == "__main__":
    sys.exit(main())
