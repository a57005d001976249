"""One training of an online method as a process of its own, ours or TRL's, and several of them side by side.

    python -m tests.bench.online_runs PLAN FOLDER     our trainer, and its highest resident memory in FOLDER/peak

Used by bench_grpo, bench_ppo and bench_learning; measures nothing itself. An iteration is a set of rollouts with the
optimizer steps that learn from them; the first one of a process, which also allocates and compiles, is not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from finetune_api.plan import RunPlan
from tests.bench.common import busy, timed_process

__all__ = ["FIGURES", "RULES", "Rule", "Run", "Side", "compared", "measure", "ours", "trl"]

HERE = Path(__file__).parent
Rule = Literal["number", "letters"]
RULES: dict[Rule, dict[str, Any]] = {
    "number": {"metric": {"kind": "numeric-answer", "column": "answer"}},
    "letters": {"function": {"call": "tests.trainers.online.scores:many_letters", "settings": {"letter": "e"}}},
}
"""Rewards by rule, as a job has them; TRL's scripts have them in baselines/rules.py."""
FIGURES = ("episodes_per_second", "tokens_per_second", "peak_bytes")


@dataclass(frozen=True)
class Run:
    """One process, by iteration."""

    episodes: int
    """Of each iteration."""
    ends: list[float]
    """Seconds since the epoch."""
    tokens: list[int]
    """Written."""
    rewards: list[float]
    kl: list[float]
    """Nats per rollout from the reference; empty where there is none."""
    peak_bytes: int

    @property
    def figures(self) -> dict[str, float]:
        """FIGURES, of all iterations but the first."""
        seconds = self.ends[-1] - self.ends[0]
        rates = self.episodes * (len(self.ends) - 1) / seconds, sum(self.tokens[1:]) / seconds
        return dict(zip(FIGURES, (round(rates[0], 3), round(rates[1], 1), self.peak_bytes), strict=True))


Side = Callable[[Path], Run]
"""Trains in a folder that is not there yet."""


def ours(plan: RunPlan, threads: int) -> Side:
    """`python -m finetune_trainers run`, as `finetune run` starts it."""
    online = plan.method.online
    assert online is not None
    steps, episodes = online.steps_per_iteration, plan.batch.global_batch_size * online.mini_batches

    def train(workdir: Path) -> Run:
        workdir.mkdir(parents=True)
        given = workdir / "given.json"
        given.write_text(plan.model_dump_json(by_alias=True))
        command = [sys.executable, "-m", "tests.bench.online_runs", str(given), str(workdir)]
        timed_process(command, {"OMP_NUM_THREADS": str(threads)}, workdir / "process.log")
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        of_steps = [line for line in lines if "loss" in line["metrics"]]
        asked, learned = of_steps[::steps], of_steps[steps - 1 :: steps]
        return Run(
            episodes=episodes,
            ends=[datetime.fromisoformat(line["time"]).timestamp() for line in learned],
            tokens=[round(line["metrics"]["response_length"] * episodes) for line in asked],
            rewards=[line["metrics"]["reward"] for line in asked],
            kl=[
                line["metrics"]["kl"] * line["metrics"]["response_length"] for line in asked if "kl" in line["metrics"]
            ],
            peak_bytes=int((workdir / "peak").read_text()),
        )

    return train


def trl(version: str, script: str, settings: Mapping[str, Any], episodes: int) -> Side:
    """A script of baselines/ in an environment with that TRL."""

    def train(workdir: Path) -> Run:
        workdir.mkdir(parents=True)
        made = subprocess.run([HERE / "trl_env.sh", version], check=True, capture_output=True, text=True)
        given, result = workdir / "settings.json", workdir / "result.json"
        given.write_text(json.dumps(settings))
        environment = {
            "OMP_NUM_THREADS": str(settings["threads"]),
            "HF_DATASETS_CACHE": str(workdir / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [made.stdout.strip(), str(HERE / "baselines" / script), str(given), str(result)]
        timed_process(command, environment, workdir / "process.log")
        document = json.loads(result.read_text())
        steps = document["steps"]
        before = [0, *(step["tokens"] for step in steps)]
        return Run(
            episodes=episodes,
            ends=[step["end"] for step in steps],
            tokens=[step["tokens"] - seen for step, seen in zip(steps, before, strict=False)],
            rewards=[step["reward"] for step in steps],
            kl=[step["kl"] for step in steps if "kl" in step],
            peak_bytes=document["peak_bytes"],
        )

    return train


def measure(sides: Mapping[str, Side], num_runs: int, folder: Path) -> dict[str, Any]:
    """All sides in turn, `num_runs` times: every run, and the medians of FIGURES."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(num_runs):
        for name, side in sides.items():
            load = busy()
            run = side(folder / f"{name.replace(' ', '-')}-{number}")
            runs[name].append(asdict(run) | run.figures | {"load_before": load})
            episodes, tokens, peak = run.figures.values()
            print(f"{name:<12} {episodes:6.2f} episodes/s, {tokens:6.1f} tokens/s, {int(peak) >> 20} MiB", flush=True)
    medians = {
        name: {figure: statistics.median(run[figure] for run in of) for figure in FIGURES} for name, of in runs.items()
    }
    return {"runs": runs, "medians": medians}


def compared(medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`ours` against the best of the others, in each figure for itself."""
    mine, *others = (medians[name] for name in sorted(medians, key=lambda name: name != "ours"))
    return {
        "ratio": round(mine["episodes_per_second"] / max(one["episodes_per_second"] for one in others), 2),
        "memory_ratio": round(mine["peak_bytes"] / min(one["peak_bytes"] for one in others), 2),
    }


def main() -> int:
    """Our trainer in this process."""
    import resource

    from finetune_trainers.__main__ import main as run

    plan, workdir = sys.argv[1:]
    code = run(["run", "--plan", plan, "--workdir", workdir, "--no-ray"])
    (Path(workdir) / "peak").write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    return code


if __name__ == "__main__":
    sys.exit(main())
