"""Episodes per second and peak memory of PPO, against TRL's PPOTrainer, in one process each.

    python -m tests.bench.bench_ppo [--runs 2] [--iterations 3] [--tunings full lora] [--sides ours trl]

The same policy, reward model, prompts, longest answer, batch, passes, precision and threads; policy, critic, reference
and reward model on both sides. The reward model is the same model with a head that has learned nothing: what it costs
does not depend on what it thinks. With LoRA ours learns two adapters; TRL's critic is learned whole all the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from tests.bench.common import model_folder, write_results
from tests.bench.online_runs import RULES, Rule, Side, compared, measure, ours, trl
from tests.bench.sft_runs import Lora
from tests.factories import job

GOALS = {"full": 1.5, "lora": 2.0}
MEMORY_GOAL = 0.7
SIDES = ("ours", "trl")
TRL = "1.12.0"
"""The last that has PPO."""
KL_HORIZON = 1000
"""Episodes: about a run's. A price that moves faster than the policy can follow overshoots."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    model: str
    reward_model: str | None
    """None: by `rule`."""
    data: str
    iterations: int
    lora: Lora | None
    threads: int
    max_new_tokens: int = 32
    micro_batch_size: int = 8
    accumulation: int = 2
    passes: int = 2
    learning_rate: float = 1e-5
    kl: float = 0.05
    kl_target: float | None = None
    """Nats per rollout. For ours alone: TRL's price is fixed."""
    seed: int = 1
    rule: Rule = "number"

    @property
    def episodes(self) -> int:
        """Of an iteration."""
        return self.micro_batch_size * self.accumulation


def our_plan(settings: Settings) -> RunPlan:
    """The job as we run it."""
    lora = settings.lora
    adapter = lora and {"rank": lora.rank, "alpha": lora.alpha, "targetModules": list(lora.target_modules)}
    judge = settings.reward_model
    reward = {"model": {"source": f"file://{judge}"}} if judge else RULES[settings.rule]
    held = {"target": settings.kl_target, "horizon": KL_HORIZON} if settings.kl_target else {}
    return plan_run(
        job(
            {
                "model.source": f"file://{settings.model}",
                "data": {"train": [{"source": f"file://{settings.data}"}]},
                "method": {
                    "ppo": {
                        "maxSeqLength": 256,
                        "sampling": {"maxNewTokens": settings.max_new_tokens},
                        "rewards": [reward],
                        "passes": settings.passes,
                        "kl": {"coefficient": settings.kl} | held,
                    }
                },
                "tuning": {"lora": adapter} if adapter else {"full": {}},
                "training": {
                    "maxSteps": settings.iterations * settings.passes,
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


def make_reward_model(model: str, folder: Path) -> str:
    """`model` as a sequence classifier with one label and a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sides_of(settings: Settings, names: list[str]) -> dict[str, Side]:
    """The sides to compare, by name."""
    sides = {
        "ours": ours(our_plan(settings), settings.threads),
        "trl": trl(TRL, "trl_ppo.py", asdict(settings), settings.episodes),
    }
    return {name: sides[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3, help="the first is not counted")
    parser.add_argument("--tunings", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-ppo-") as folder:
        model, data = str(model_folder()), str(ROOT / "manifests/samples/data/arithmetic.jsonl")
        judge = make_reward_model(model, Path(folder) / "reward")
        for tuning in arguments.tunings:
            lora = Lora() if tuning == "lora" else None
            threads = len(os.sched_getaffinity(0))
            settings = Settings(model, judge, data, arguments.iterations, lora, threads)
            print(f"{tuning}:", flush=True)
            found = measure(sides_of(settings, arguments.sides), arguments.runs, Path(folder) / tuning)
            results[tuning] = {"goal": GOALS[tuning], "settings": asdict(settings), **found}
    if set(arguments.sides) != set(SIDES):
        return 0
    met = True
    for tuning, found in results.items():
        found |= compared(found["medians"])
        met &= found["ratio"] >= found["goal"] and found["memory_ratio"] <= MEMORY_GOAL
        print(
            f"{tuning}: {found['ratio']:.2f}x TRL's episodes per second (goal {found['goal']}x), "
            f"{found['memory_ratio']:.2f} of its peak memory (goal {MEMORY_GOAL})"
        )
    if set(arguments.tunings) == set(GOALS):
        write_results("ppo", {"memory_goal": MEMORY_GOAL, **results})
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
