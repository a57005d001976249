"""Episodes per second and peak memory of GRPO, against TRL's GRPOTrainer, in one process each.

    python -m tests.bench.bench_grpo [--runs 3] [--steps 4] [--sides ours "trl default" "trl tuned"]

The same model, questions, answers to each, longest answer, batch, LoRA, precision and threads; no reference on any
side. TRL runs as it comes (`default`: gradient checkpointing on), and `tuned` for speed; the ratio is against the
better one. What is written is drawn at random, so tokens per second stand beside episodes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from tests.bench.common import busy, model_folder, timed_process, write_results
from tests.bench.sft_runs import Lora
from tests.factories import job

GOAL = 1.3
SIDES = ("ours", "trl default", "trl tuned")
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    """What all sides are given."""

    model: str
    data: str
    steps: int
    max_new_tokens: int = 32
    group_size: int = 8
    micro_batch_size: int = 16
    accumulation: int = 2
    learning_rate: float = 1e-4
    seed: int = 1
    threads: int = 2
    lora: Lora = field(default_factory=Lora)

    @property
    def episodes(self) -> int:
        """Of a step."""
        return self.micro_batch_size * self.accumulation


@dataclass(frozen=True)
class Run:
    """One process: the first step, which also allocates and compiles, is not counted."""

    ends: list[float]
    tokens: list[int]
    """Written for each step."""
    rewards: list[float]
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[0]

    def rates(self, episodes: int) -> tuple[float, float]:
        """Episodes and written tokens, per second."""
        return episodes * (len(self.ends) - 1) / self.seconds, sum(self.tokens[1:]) / self.seconds


def our_plan(settings: Settings) -> RunPlan:
    reward = {"metric": {"kind": "numeric-answer", "column": "answer"}}
    return plan_run(
        job(
            {
                "model.source": f"file://{settings.model}",
                "data": {"train": [{"source": f"file://{settings.data}"}]},
                "method": {
                    "grpo": {
                        "groupSize": settings.group_size,
                        "maxSeqLength": 256,
                        "sampling": {"maxNewTokens": settings.max_new_tokens},
                        "rewards": [reward],
                    }
                },
                "tuning": {
                    "lora": {
                        "rank": settings.lora.rank,
                        "alpha": settings.lora.alpha,
                        "targetModules": list(settings.lora.target_modules),
                    }
                },
                "training": {
                    "maxSteps": settings.steps,
                    "globalBatchSize": settings.episodes,
                    "microBatchSize": settings.micro_batch_size,
                    "learningRate": settings.learning_rate,
                    "schedule": "constant",
                    "warmupFraction": 0.0,
                    "precision": "fp32",
                    "seed": settings.seed,
                },
                "cluster": {"workers": {"replicas": 1, "cpus": settings.threads}},
            }
        )
    )


def ours(settings: Settings, workdir: Path) -> Run:
    """`python -m finetune_trainers run`, as `finetune run` starts it."""
    workdir.mkdir(parents=True)
    given = workdir / "given.json"
    given.write_text(our_plan(settings).model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "tests.bench.bench_grpo", "--trainer", str(given), str(workdir)]
    timed_process(command, {"OMP_NUM_THREADS": str(settings.threads)}, workdir / "process.log")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line["metrics"]]
    return Run(
        ends=[datetime.fromisoformat(line["time"]).timestamp() for line in logged],
        tokens=[round(line["metrics"]["response_length"] * settings.episodes) for line in logged],
        rewards=[line["metrics"]["reward"] for line in logged],
        peak_bytes=int((workdir / "peak").read_text()),
    )


def trainer(plan: Path, workdir: Path) -> int:
    """Our trainer in this process, and its highest resident memory."""
    import resource

    from finetune_trainers.__main__ import main as run

    code = run(["run", "--plan", str(plan), "--workdir", str(workdir), "--no-ray"])
    (workdir / "peak").write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    return code


def trl(settings: Settings, workdir: Path, variant: str) -> Run:
    """The same with TRL, in its own environment; `variant` as in baselines/trl_grpo.py."""
    workdir.mkdir(parents=True)
    interpreter = subprocess.run([HERE / "trl_env.sh"], check=True, capture_output=True, text=True).stdout.strip()
    given, result = workdir / "settings.json", workdir / "result.json"
    given.write_text(json.dumps(asdict(settings) | {"variant": variant}))
    environment = {
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_DATASETS_CACHE": str(workdir / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    timed_process(
        [interpreter, str(HERE / "baselines" / "trl_grpo.py"), str(given), str(result)],
        environment,
        workdir / "process.log",
    )
    document = json.loads(result.read_text())
    steps = document["steps"]
    before = [0, *(step["tokens"] for step in steps)]
    return Run(
        ends=[step["end"] for step in steps],
        tokens=[step["tokens"] - seen for step, seen in zip(steps, before, strict=False)],
        rewards=[step["reward"] for step in steps],
        peak_bytes=document["peak_bytes"],
    )


def measure(sides: list[str], num_runs: int, num_steps: int) -> dict[str, Any]:
    """All sides in turn, `num_runs` times."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="bench-grpo-") as folder:
        data = ROOT / "manifests/samples/data/arithmetic.jsonl"
        settings = Settings(str(model_folder()), str(data), num_steps, threads=len(os.sched_getaffinity(0)))
        for number in range(num_runs):
            for side in sides:
                load, workdir = busy(), Path(folder) / f"{side.replace(' ', '-')}-{number}"
                run = ours(settings, workdir) if side == "ours" else trl(settings, workdir, side.split()[1])
                episodes, tokens = run.rates(settings.episodes)
                found = {"episodes_per_second": round(episodes, 3), "tokens_per_second": round(tokens, 1)}
                runs[side].append(asdict(run) | found | {"load_before": load})
                print(
                    f"{side:<12} {episodes:6.2f} episodes/s, {tokens:6.1f} tokens/s, {run.peak_bytes >> 20} MiB",
                    flush=True,
                )
    medians = {
        side: {
            name: statistics.median(run[name] for run in of)
            for name in ("episodes_per_second", "tokens_per_second", "peak_bytes")
        }
        for side, of in runs.items()
    }
    return {"settings": asdict(settings), "runs": runs, "medians": medians}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps; the first is not counted")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--trainer", nargs=2, metavar=("PLAN", "FOLDER"), help="our side, in this process")
    arguments = parser.parse_args()
    if arguments.trainer:
        return trainer(*(Path(path) for path in arguments.trainer))
    found = measure(arguments.sides, arguments.runs, arguments.steps)
    peers = [figures for side, figures in found["medians"].items() if side != "ours"]
    mine = found["medians"].get("ours")
    if not peers or mine is None:
        return 0
    ratio = mine["episodes_per_second"] / max(peer["episodes_per_second"] for peer in peers)
    memory = mine["peak_bytes"] / min(peer["peak_bytes"] for peer in peers)
    write_results("grpo", {"goal": GOAL, "ratio": round(ratio, 2), "memory_ratio": round(memory, 2), **found})
    print(f"{ratio:.2f}x the better TRL's episodes per second (goal {GOAL}x), {memory:.2f} of its least peak memory")
    return int(ratio < GOAL)


if __name__ == "__main__":
    sys.exit(main())
