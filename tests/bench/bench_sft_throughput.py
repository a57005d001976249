"""Real tokens per second of supervised fine-tuning, against TRL's SFTTrainer, in one process each.

    python -m tests.bench.bench_sft_throughput [--precision fp32 bf16] [--runs 3] [--steps 5]

The same model, rows, packing, length, batch, LoRA, precision and threads; the loss is on the answers in both. TRL runs
twice: as it comes (`default`: gradient checkpointing on), and `tuned` for speed. The ratio is against the better one.

On a CPU without bf16 instructions TRL's bf16 is far slower than its fp32, and nobody would choose it: when both
precisions are measured, bf16 is also held against TRL's fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune_trainers.cpu_bf16 import bf16_is_emulated
from tests.bench.common import busy, write_results
from tests.bench.sft_runs import Run, Settings, ours, settings_for, trl

GOAL = 1.2
HOPELESS = 5.0
"""A side this many times slower than ours is run once: more runs would tell nothing and take hours."""
SIDES = ("ours", "trl default", "trl tuned")


def one(side: str, settings: Settings, workdir: Path) -> Run:
    return ours(settings, workdir) if side == "ours" else trl(settings, workdir, side.split()[1])


def measure(precision: str, num_runs: int, num_steps: int) -> dict[str, Any]:
    """All sides in turn, `num_runs` times."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as folder:
        settings = settings_for(Path(folder), precision, num_steps)
        if precision == "bf16" and bf16_is_emulated(torch.device("cpu")) and not torch.cuda.is_available():
            settings = replace(settings, steps=2, accumulation=1)  # a pass of TRL's takes minutes on such a CPU
        for number in range(num_runs):
            for side in SIDES:
                if rates[side] and rates[side][0] * HOPELESS < rates["ours"][0]:
                    continue
                load = busy()
                run = one(side, settings, Path(folder) / f"{side.replace(' ', '-')}-{number}")
                runs[side].append(run.to_document() | {"load_before": load})
                rates[side].append(run.tokens_per_second)
                print(f"{precision} {side:<12} {run.tokens_per_second:7.1f} tokens/s (load before {load})", flush=True)
    medians = {side: statistics.median(values) for side, values in rates.items()}
    ratios = {side: medians["ours"] / medians[side] for side in SIDES[1:]}
    return {
        "precision": precision,
        "runs": runs,
        "median_tokens_per_second": {side: round(value, 1) for side, value in medians.items()},
        "ratio_to": {side: round(value, 2) for side, value in ratios.items()},
        "ratio": round(min(ratios.values()), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps; the first is not counted")
    arguments = parser.parse_args()
    rates = {precision: measure(precision, arguments.runs, arguments.steps) for precision in arguments.precision}
    medians = {precision: figure["median_tokens_per_second"] for precision, figure in rates.items()}
    best_peer = max(max(sides[side] for side in SIDES[1:]) for sides in medians.values())
    ratios = {precision: round(sides["ours"] / best_peer, 2) for precision, sides in medians.items()}
    write_results("sft_throughput", {"goal": GOAL, "ratio_to_best_of_both_precisions": ratios, "figures": rates})
    for precision, figure in rates.items():
        print(
            f"{precision}: {figure['ratio']}x the better TRL (goal {GOAL}x), of {figure['ratio_to']};"
            f" {ratios[precision]}x TRL's best in any precision measured"
        )
    return int(any(figure["ratio"] < GOAL for figure in rates.values()))


if __name__ == "__main__":
    sys.exit(main())
