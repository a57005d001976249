"""Largest difference of loss and gradient norm from a plain transformers + torch loop, on the real 135M model, in fp32.

    python -m tests.bench.bench_parity [--stages 0 1 2 3] [--tunings full lora] [--workers 1 2] [--steps 20] [--add]

`tests/trainers/test_parity.py` asks the same of a tiny model in each run of the tests; here the weights, the text and
the size are real. Runs of two workers share one Ray Train group. All of it takes half an hour on two cores: with --add
it may be measured in parts, which leave what the results hold of other runs as it is, the plain loop's curves included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_api.plan import RunPlan
from finetune_api.progress import Result
from finetune_operator.planning import plan_run
from finetune_trainers import launch
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.ray_workers import RayWorkers
from tests.bench.common import RESULTS, busy, cache_folder, model_folder, write_results
from tests.bench.sft_runs import write_rows
from tests.factories import job
from tests.trainers import reference
from tests.trainers.parity_group import train_all

GOAL = 1e-4
ROOT = Path(__file__).parents[2]
TUNINGS: dict[str, dict[str, Any]] = {"full": {"full": {}}, "lora": {"lora": {"rank": 8, "alpha": 16}}}
Curve = list[dict[str, float]]


def plan_of(tuning: str, stage: int, workers: int, rows: Path, steps: int) -> RunPlan:
    return plan_run(
        job(
            {
                "model.source": f"file://{model_folder()}",
                "data.train": [{"source": f"file://{rows}"}],
                "data.eval": [],
                "method.sft": {"maxSeqLength": 256, "longRows": "truncate"},
                "tuning": TUNINGS[tuning],
                "training": {
                    "maxSteps": steps,
                    "globalBatchSize": 2,
                    "learningRate": 1e-4,
                    "schedule": "linear",
                    "warmupFraction": 0.2,
                    "precision": "fp32",
                },
                # A key of DeepSpeed's own makes planning choose DeepSpeed for stage 0 on one worker too.
                "deepspeed": {"zeroStage": stage, "config": {"wall_clock_breakdown": False}},
                "cluster": {"workers": {"replicas": workers, "cpus": 2 / workers}},
            }
        )
    )


def prepared(plan: RunPlan, folder: Path) -> PreparedRun:
    outcome = launch.check(plan, folder, cache_folder())
    if outcome.result is not Result.SUCCEEDED:
        sys.exit(f"preparing {folder.name} failed: {outcome.failure}")
    return PreparedRun.model_validate_json((folder / "prepared.json").read_bytes())


def alone(plans: dict[str, RunPlan], folder: Path) -> dict[str, Curve]:
    """The curves of plans of one worker, made in this process."""
    curves = {}
    for name, plan in plans.items():
        outcome = launch.run(plan, folder / name, cache_folder(), use_ray=False)
        if outcome.failure is not None:
            sys.exit(f"{name} failed: {outcome.failure.message}")
        curves[name] = reference.metrics_of(folder / name)
        print(f"{name}: done", flush=True)
    return curves


def together(plans: dict[str, RunPlan], folder: Path) -> dict[str, Curve]:
    """The curves of plans of two workers, made one after the other in one Ray Train group."""
    if not plans:
        return {}
    given = {name: prepared(plan, folder / name) for name, plan in plans.items()}
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    first = next(iter(plans))
    with RayWorkers(plans[first], train_all) as ray:
        ray.run(given[first], folder, lambda future: future.result())
    for ended in sorted(folder.glob("*/ended-*.json")):
        if (failure := json.loads(ended.read_text())["failure"]) is not None:
            sys.exit(f"{ended.parent.name} failed: {failure}")
    return {name: reference.metrics_of(folder / name) for name in plans}


def difference(ours: Curve, theirs: Curve) -> dict[str, float]:
    return {
        figure: max(abs(one[figure] - other[figure]) for one, other in zip(ours, theirs, strict=True))
        for figure in ("loss", "grad_norm")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3], choices=range(4))
    parser.add_argument("--tunings", nargs="+", default=list(TUNINGS), choices=list(TUNINGS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--add", action="store_true", help="keep the other runs of the results, of as many steps")
    arguments = parser.parse_args()
    before = earlier(arguments.steps) if arguments.add else {}
    with tempfile.TemporaryDirectory(prefix="bench-parity-") as name:
        curves = measure(Path(name), before, arguments.stages, arguments.tunings, arguments.workers, arguments.steps)
    return tell(before | curves, arguments.steps)


def earlier(steps: int) -> dict[str, Curve]:
    """The curves that the results hold, if they are of as many steps."""
    file = RESULTS / "parity.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    curves: dict[str, Curve] = found["curves"] if found.get("steps") == steps else {}
    return curves


def measure(
    folder: Path,
    before: Mapping[str, Curve],
    stages: Sequence[int],
    tunings: Sequence[str],
    workers: Sequence[int],
    steps: int,
) -> dict[str, Curve]:
    """The curves of the plain loop, where `before` has none, and of every run that is asked for."""
    rows = write_rows(folder / "rows.jsonl", 200)
    wanted: dict[str, Curve] = {}
    for name in [f"reference-{tuning}" for tuning in tunings]:
        if name not in before:
            plan = plan_of(name.removeprefix("reference-"), 0, 1, rows, steps)
            wanted[name] = curve = reference.train(plan, prepared(plan, folder / name))
            print(f"{name}: loss {curve[0]['loss']:.4f} -> {curve[-1]['loss']:.4f}", flush=True)
    plans = {
        count: {
            f"zero{stage}-{tuning}-{count}": plan_of(tuning, stage, count, rows, steps)
            for stage in stages
            for tuning in tunings
        }
        for count in workers
    }
    ours = alone(plans.get(1, {}), folder / "one") | together(plans.get(2, {}), folder / "two")
    return wanted | ours


def tell(curves: dict[str, Curve], steps: int) -> int:
    """Keep the curves and their differences, print them; 0 when no loss is farther off than the goal."""
    differences = {
        name: difference(curve, curves[f"reference-{name.split('-')[1]}"])
        for name, curve in curves.items()
        if not name.startswith("reference-")
    }
    worst = max(found["loss"] for found in differences.values())
    results = {"goal": GOAL, "steps": steps, "load": busy(), "largest_difference": differences}
    write_results("parity", results | {"curves": curves})
    for run, found in differences.items():
        print(f"{run:<16} loss within {found['loss']:.1e}, gradient norm within {found['grad_norm']:.1e}")
    print(f"largest difference of a loss in {steps} steps: {worst:.1e} (goal {GOAL:.0e})")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
