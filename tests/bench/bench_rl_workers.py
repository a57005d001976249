"""How many more episodes per second two workers make than one, with GRPO and with PPO.

    python -m tests.bench.bench_rl_workers [--runs 2] [--iterations 4] [--methods grpo ppo]

`finetune run`, so Ray Train with DeepSpeed where there are two; each worker has one thread and its own core. The global
batch is the same: two workers share what one does alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tests.bench.bench_alignment import finetune
from tests.bench.bench_grpo import ROOT
from tests.bench.common import busy, model_folder, write_results
from tests.factories import job_document

GOAL = 1.6
EPISODES = 32
METHODS: dict[str, dict[str, Any]] = {"grpo": {"groupSize": 8}, "ppo": {"passes": 2}}
REWARD = {"metric": {"kind": "numeric-answer", "column": "answer"}}


def manifest(method: str, workers: int, iterations: int) -> dict[str, Any]:
    shared = {"maxSeqLength": 256, "sampling": {"maxNewTokens": 32}, "rewards": [REWARD]}
    settings = METHODS[method]
    return job_document(
        {
            "model.source": f"file://{model_folder()}",
            "data": {"train": [{"source": f"file://{ROOT}/manifests/samples/data/arithmetic.jsonl"}]},
            "method": {method: shared | settings},
            "tuning": {"lora": {"rank": 8, "alpha": 16, "targetModules": ["q_proj", "v_proj"]}},
            "training": {
                "maxSteps": iterations * settings.get("passes", 1),
                "globalBatchSize": EPISODES,
                "microBatchSize": 8,
                "learningRate": 1e-5,
                "schedule": "constant",
                "warmupFraction": 0.0,
                "precision": "fp32",
            },
            "cluster": {"workers": {"replicas": workers, "cpus": 1}},
        },
        name=f"{method}-{workers}",
    )


def episodes_per_second(method: str, workers: int, iterations: int, folder: Path) -> float:
    """Of all iterations but the first."""
    folder.mkdir(parents=True)
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(manifest(method, workers, iterations)))
    finetune(["run", str(file), "--workdir", str(folder / "run"), "--quiet"], folder / "run.log")
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    ends = [datetime.fromisoformat(line["time"]).timestamp() for line in lines if "loss" in line["metrics"]]
    per_iteration = METHODS[method].get("passes", 1)
    ends = ends[per_iteration - 1 :: per_iteration]
    return round(EPISODES * (len(ends) - 1) / (ends[-1] - ends[0]), 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=4, help="the first is not counted")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-rl-workers-") as name:
        for method in arguments.methods:
            runs: dict[str, list[float]] = {"one": [], "two": []}
            loads: list[float] = []
            for number in range(arguments.runs):
                for workers, found in zip((1, 2), runs.values(), strict=True):
                    loads.append(busy())
                    folder = Path(name) / f"{method}-{workers}-{number}"
                    found.append(episodes_per_second(method, workers, arguments.iterations, folder))
            ratio = statistics.median(runs["two"]) / statistics.median(runs["one"])
            results[method] = {"ratio": round(ratio, 2), "episodes_per_second": runs, "load_before": loads}
            print(f"{method}: {ratio:.2f}x with two workers (goal {GOAL}x); episodes/s {runs}", flush=True)
    if set(arguments.methods) == set(METHODS):
        write_results("rl_workers", {"goal": GOAL, "cores": len(os.sched_getaffinity(0)), **results})
    return int(any(found["ratio"] < GOAL for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
