"""Episodes per second and peak memory of GRPO, against TRL's GRPOTrainer, in one process each.

    python -m tests.bench.bench_grpo [--runs 3] [--iterations 4] [--sides ours "trl default" "trl tuned"]

The same model, questions, answers to each, longest answer, batch, LoRA, precision and threads; no reference on any
side. TRL runs as it comes (`default`: gradient checkpointing on), and `tuned` for speed; the ratio is against the
better one. What is written is drawn at random, so tokens per second stand beside episodes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from tests.bench.common import model_folder, write_results
from tests.bench.online_runs import RULES, Rule, Side, compared, measure, ours, trl
from tests.bench.sft_runs import Lora
from tests.factories import job

GOAL = 1.3
SIDES = ("ours", "trl default", "trl tuned")
TRL = "1.16.0"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """What all sides are given."""

    model: str
    data: str
    iterations: int
    threads: int
    max_new_tokens: int = 32
    group_size: int = 8
    micro_batch_size: int = 16
    accumulation: int = 2
    learning_rate: float = 1e-4
    seed: int = 1
    lora: Lora | None = field(default_factory=Lora)
    rule: Rule = "number"

    @property
    def episodes(self) -> int:
        """Of an iteration, which is one optimizer step."""
        return self.micro_batch_size * self.accumulation


def our_plan(settings: Settings) -> RunPlan:
    """The job as we run it."""
    lora = settings.lora
    adapter = lora and {"rank": lora.rank, "alpha": lora.alpha, "targetModules": list(lora.target_modules)}
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
                        "rewards": [RULES[settings.rule]],
                    }
                },
                "tuning": {"lora": adapter} if adapter else {"full": {}},
                "training": {
                    "maxSteps": settings.iterations,
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


def sides_of(settings: Settings, names: list[str]) -> dict[str, Side]:
    """The sides to compare, by name."""
    sides = {"ours": ours(our_plan(settings), settings.threads)}
    for variant in ("default", "tuned"):
        given = asdict(settings) | {"variant": variant}
        sides[f"trl {variant}"] = trl(TRL, "trl_grpo.py", given, settings.episodes)
    return {name: sides[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=4, help="the first is not counted")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-grpo-") as folder:
        data = ROOT / "manifests/samples/data/arithmetic.jsonl"
        settings = Settings(str(model_folder()), str(data), arguments.iterations, len(os.sched_getaffinity(0)))
        found = measure(sides_of(settings, arguments.sides), arguments.runs, Path(folder))
    if "ours" not in arguments.sides or len(arguments.sides) < 2:
        return 0
    ratios = compared(found["medians"])
    write_results("grpo", {"goal": GOAL, **ratios, "settings": asdict(settings), **found})
    print(
        f"{ratios['ratio']:.2f}x the better TRL's episodes per second (goal {GOAL}x), "
        f"{ratios['memory_ratio']:.2f} of its least peak memory"
    )
    return int(ratios["ratio"] < GOAL)


if __name__ == "__main__":
    sys.exit(main())
