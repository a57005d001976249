"""What GRPO and PPO have learned after as many episodes, against TRL's GRPOTrainer and PPOTrainer.

    python -m tests.bench.bench_learning [--seeds 3] [--tasks letters number] [--methods grpo ppo] [--iterations N]

Two tasks that a rule judges: a new model of a few thousand weights shall write the letter e (all weights learn), and
the real one shall answer sums with their number (LoRA). Both sides have the same model, prompts, rule, batch, passes,
learning rate, price of KL and seeds; all else is as each comes. What a run has learned is the mean reward of its last
quarter. TRL's price is fixed, so ours is here, too. What becomes of a price that follows a target is a third run of
PPO, of the small model: its highest distance from the reference is held against the target. Nobody is timed: runs share
the machine, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench import bench_grpo, bench_ppo
from tests.bench.common import RESULTS, model_folder, write_results
from tests.bench.online_runs import Rule, Run, Side, ours, trl
from tests.bench.sft_runs import Lora
from tests.trainers.online.online_world import OnlineWorld

METHODS = ("grpo", "ppo")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Task:
    """What is to be learned, and how fast."""

    rule: Rule
    model: str
    data: str
    lora: Lora | None
    max_new_tokens: int
    rates: dict[str, float]
    iterations: dict[str, int]
    kl: float
    """The price, of PPO."""
    held: tuple[float, float] | None
    """The price at the beginning and the target, in nats per answer, of another run of PPO that has one."""


def tasks(folder: Path) -> dict[str, Task]:
    world = OnlineWorld.at(folder).world
    return {
        "letters": Task(
            rule="letters",
            model=str(world.model),
            data=str(world.folder / "prompts.jsonl"),
            lora=None,
            max_new_tokens=12,
            rates={"grpo": 3e-3, "ppo": 3e-3},
            iterations={"grpo": 40, "ppo": 40},
            kl=0.02,
            held=(0.05, 6.0),
        ),
        "number": Task(
            rule="number",
            model=str(model_folder()),
            data=str(ROOT / "manifests/samples/data/arithmetic.jsonl"),
            lora=Lora(),
            max_new_tokens=8,
            rates={"grpo": 1e-3, "ppo": 1e-3},
            iterations={"grpo": 24, "ppo": 24},
            kl=0.02,
            held=None,
        ),
    }


def sides_of(task: Task, method: str, iterations: int, seed: int) -> dict[str, Side]:
    """Ours and TRL's, of one seed; for PPO also `held`, ours with a target of KL."""
    rate = task.rates[method]
    if method == "grpo":
        grouped = bench_grpo.Settings(
            task.model,
            task.data,
            iterations,
            threads=1,
            max_new_tokens=task.max_new_tokens,
            learning_rate=rate,
            seed=seed,
            lora=task.lora,
            rule=task.rule,
        )
        given = asdict(grouped) | {"variant": "tuned"}
        peer = trl(bench_grpo.TRL, "trl_grpo.py", given, grouped.episodes)
        return {"ours": ours(bench_grpo.our_plan(grouped), 1), "trl": peer}
    valued = bench_ppo.Settings(
        task.model,
        None,
        task.data,
        iterations,
        task.lora,
        threads=1,
        max_new_tokens=task.max_new_tokens,
        micro_batch_size=16,
        learning_rate=rate,
        kl=task.kl,
        seed=seed,
        rule=task.rule,
    )
    peer = trl(bench_ppo.TRL, "trl_ppo.py", asdict(valued), valued.episodes)
    sides = {"ours": ours(bench_ppo.our_plan(valued), 1), "trl": peer}
    if task.held is not None:
        kl, target = task.held
        sides["held"] = ours(bench_ppo.our_plan(replace(valued, kl=kl, kl_target=target)), 1)
    return sides


def run_all(task: Task, method: str, iterations: int, seeds: int, folder: Path) -> dict[str, list[Run]]:
    """Every seed of every side, as many at once as there are cores."""
    runs: dict[str, list[Run]] = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        begun = [
            (name, pool.submit(side, folder / f"{name}-{seed}"))
            for seed in range(1, seeds + 1)
            for name, side in sides_of(task, method, iterations, seed).items()
        ]
        for name, run in begun:
            runs.setdefault(name, []).append(run.result())
    return runs


def last_quarter(values: Sequence[float]) -> float:
    return statistics.fmean(values[-(-3 * len(values) // 4) :])


def share_needed(rewards: Sequence[float], wanted: float) -> float | None:
    """The share of a run's iterations after which as many as a quarter of them had `wanted` as their mean."""
    window = len(rewards) // 4
    for end in range(window, len(rewards) + 1):
        if statistics.fmean(rewards[end - window : end]) >= wanted:
            return round(end / len(rewards), 3)
    return None


def compared(runs: dict[str, list[Run]], task: Task, method: str) -> dict[str, Any]:
    """What each side has learned, and how many of TRL's episodes ours needed for as much, seeds together."""
    final = {name: [round(last_quarter(run.rewards), 4) for run in of] for name, of in runs.items()}
    first = {name: [round(run.rewards[0], 4) for run in of] for name, of in runs.items()}
    mean = [statistics.fmean(at) for at in zip(*(run.rewards for run in runs["ours"]), strict=True)]
    found: dict[str, Any] = {
        "first": first,
        "final": final,
        "share_of_episodes": share_needed(mean, statistics.fmean(final["trl"])),
    }
    if method == "ppo":
        found["kl_final"] = {name: [round(last_quarter(run.kl), 3) for run in of] for name, of in runs.items()}
        found["kl_highest"] = {name: [round(max(run.kl), 3) for run in of] for name, of in runs.items()}
    if "held" in runs:
        assert task.held is not None, "it has no target"
        found["kl_target"] = task.held[1]
    return found


def met(found: dict[str, Any]) -> bool:
    within = max(found["kl_highest"]["held"]) <= found["kl_target"] if "kl_target" in found else True
    return found["share_of_episodes"] is not None and within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=("letters", "number"), default=["letters", "number"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--iterations", type=int, help="in the place of each task's own; nothing is kept then")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as name:
        folder = Path(name)
        known = tasks(folder / "letters")
        for task_name in arguments.tasks:
            task = known[task_name]
            for method in arguments.methods:
                iterations = arguments.iterations or task.iterations[method]
                runs = run_all(task, method, iterations, arguments.seeds, folder / f"{task_name}-{method}")
                found = compared(runs, task, method)
                results[f"{task_name}, {method}"] = {
                    **found,
                    "settings": asdict(task) | {"iterations": iterations, "episodes": runs["ours"][0].episodes},
                    "runs": {side: [asdict(run) for run in of] for side, of in runs.items()},
                }
                print(f"{task_name}, {method}: {found}", flush=True)
    if arguments.iterations is None:
        before = RESULTS / "learning.json"
        kept = json.loads(before.read_text()) if before.exists() else {}
        kept.pop("machine", None)
        write_results("learning", kept | results)
    return int(not all(met(found) for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
