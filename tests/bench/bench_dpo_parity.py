"""Largest difference of loss and gradient norm from TRL's DPOTrainer over 20 optimizer steps, in fp32.

    python -m tests.bench.bench_dpo_parity [--steps 20] [--model tiny|real]

Both see the same pairs in the same order. TRL pads a batch and keeps a second model as the reference; here both answers
lie in one packed row and the reference was asked once. Neither may show in a step.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from finetune_trainers import launch
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.methods.building import train_batches
from finetune_trainers.prepared import PreparedRun
from tests.bench.common import busy, cache_folder, model_folder, timed_process, write_results
from tests.factories import job
from tests.trainers.factories import tiny_model, write_pairs

GOAL = 1e-4
HERE = Path(__file__).parent
LOSS_TYPES = ("sigmoid", "ipo", "hinge")
BATCH, LENGTH, BETA, THREADS = 4, 128, 0.1, 1
RATES = {"tiny": 1e-3, "real": 1e-5}
Curves = dict[str, dict[str, list[float]]]


def plan_of(loss_type: str, model: Path, rows: Path, steps: int, rate: float) -> RunPlan:
    return plan_run(
        job(
            {
                "model.source": f"file://{model}",
                "data.train": [{"source": f"file://{rows}"}],
                "data.eval": [],
                "method": {"dpo": {"maxSeqLength": LENGTH, "beta": BETA, "lossType": loss_type}},
                "tuning": {"full": {}},
                "training": {
                    "maxSteps": steps,
                    "globalBatchSize": BATCH,
                    "learningRate": rate,
                    "schedule": "constant",
                    "warmupFraction": 0,
                    "precision": "fp32",
                },
                "cluster": {"workers": {"cpus": THREADS}},
            }
        )
    )


def ours(plan: RunPlan, folder: Path) -> dict[str, list[float]]:
    outcome = launch.run(plan, folder, cache_folder(), use_ray=False)
    if outcome.failure is not None:
        sys.exit(f"{folder.name} failed: {outcome.failure.message}")
    logged = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [one for one in logged if "loss" in one]
    return {name: [one[name] for one in steps] for name in steps[0]}


def write_in_order(plan: RunPlan, folder: Path, model: Path, rows: Path, file: Path) -> None:
    """The rows as TRL is to see them: rendered by the same template, in the order of our batches."""
    from transformers import AutoTokenizer

    prepared = PreparedRun.model_validate_json((folder / "prepared.json").read_bytes())
    batches = train_batches(plan, prepared, SingleProcessContext(plan, folder))
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    with file.open("w") as out:
        for step in range(prepared.total_steps):
            for batch in batches.step(step).micro_batches:
                for _, number in batch.slots:
                    asked = [{"role": "user", "content": given[number]["prompt"]}]
                    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
                    out.write(json.dumps(given[number] | {"prompt": prompt}) + "\n")


def theirs(model: Path, file: Path, steps: int, rate: float, folder: Path) -> Curves:
    interpreter = subprocess.run([HERE / "trl_env.sh"], check=True, capture_output=True, text=True).stdout.strip()
    settings, result = folder / "settings.json", folder / "result.json"
    wanted = {
        "model": str(model),
        "data": str(file),
        "loss_types": LOSS_TYPES,
        "beta": BETA,
        "max_length": LENGTH,
        "batch_size": BATCH,
        "steps": steps,
        "learning_rate": rate,
        "threads": THREADS,
    }
    settings.write_text(json.dumps(wanted))
    command = [interpreter, str(HERE / "baselines" / "trl_dpo.py"), str(settings), str(result)]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(THREADS), "HF_HOME": str(folder / "hf")}
    timed_process(command, environment, folder / "process.log")
    curves: Curves = json.loads(result.read_text())
    return curves


def largest(one: list[float], other: list[float]) -> float:
    difference = max(abs(a - b) for a, b in zip(one, other, strict=True))
    return difference if math.isfinite(difference) else math.inf  # a comparison with NaN is false


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", choices=list(RATES), default="tiny")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-dpo-parity-") as name:
        return measure(Path(name), arguments.model, arguments.steps)


def measure(folder: Path, kind: str, steps: int) -> int:
    load, rate = busy(), RATES[kind]
    model = tiny_model(folder / "model") if kind == "tiny" else model_folder()
    rows = write_pairs(folder / "pairs.jsonl", 60)
    plans = {loss_type: plan_of(loss_type, model, rows, steps, rate) for loss_type in LOSS_TYPES}
    found = {loss_type: ours(plan, folder / loss_type) for loss_type, plan in plans.items()}
    write_in_order(plans["sigmoid"], folder / "sigmoid", model, rows, folder / "in-order.jsonl")
    peer = theirs(model, folder / "in-order.jsonl", steps, rate, folder)
    differences = {
        loss_type: {figure: largest(found[loss_type][figure], values) for figure, values in curve.items()}
        for loss_type, curve in peer.items()
    }
    results = {"goal": GOAL, "model": kind, "steps": steps, "load_before": load, "largest_difference": differences}
    write_results("dpo_parity", results | {"ours": found, "trl": peer})
    for loss_type, figures in differences.items():
        print(f"{loss_type:<8} " + ", ".join(f"{figure} within {value:.1e}" for figure, value in figures.items()))
        print(f"         loss {found[loss_type]['loss'][0]:.4f} -> {found[loss_type]['loss'][-1]:.4f}")
    worst = max(figures["loss"] for figures in differences.values())
    print(f"largest difference of a loss in {steps} steps: {worst:.1e} (goal {GOAL:.0e})")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
