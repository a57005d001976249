"""One supervised fine-tuning run, ours or TRL's, on the same settings: when each optimizer step ended, and its tokens.

Called by bench_sft_throughput and bench_startup. Each run is a process of its own with caches of its own, so nothing is
carried from one to the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_api.plan import RunPlan
from finetune_operator.planning import plan_run
from tests.bench.bench_tokenize import docstring_rows
from tests.bench.common import model_folder, timed_process
from tests.factories import job

__all__ = ["Lora", "Run", "Settings", "Step", "ours", "trl", "write_rows"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Lora:
    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    model: str
    data: str
    precision: str
    max_seq_length: int = 1024
    micro_batch_size: int = 1
    accumulation: int = 2
    steps: int = 5
    learning_rate: float = 2e-4
    seed: int = 1
    threads: int = 2
    lora: Lora = field(default_factory=Lora)


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    end: float
    """Seconds since the epoch."""
    tokens: int
    """That went through the model, padding left out."""
    trained_tokens: int
    """Those inside the loss."""


@dataclass(frozen=True)
class Run:
    """One process."""

    started: float
    steps: list[Step]
    losses: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Over all steps but the first, which also allocates and compiles."""
        return sum(step.tokens for step in self.steps[1:]) / (self.steps[-1].end - self.steps[0].end)

    @property
    def seconds_to_first_step(self) -> float:
        """From the command to the end of the first optimizer step."""
        return self.steps[0].end - self.started

    def to_document(self) -> dict[str, Any]:
        return asdict(self) | {
            "tokens_per_second": round(self.tokens_per_second, 1) if len(self.steps) > 1 else None,
            "seconds_to_first_step": round(self.seconds_to_first_step, 2),
        }


def write_rows(file: Path, limit: int) -> Path:
    """Conversations in `file`, as jsonl: the running Python's documentation."""
    file.write_text("".join(json.dumps(row) + "\n" for row in docstring_rows(limit)))
    return file


def settings_for(scratch: Path, precision: str, steps: int, rows: int = 600) -> Settings:
    """The settings of a benchmark, with their data written to `scratch`."""
    data = write_rows(scratch / "rows.jsonl", rows)
    return Settings(model=str(model_folder()), data=str(data), precision=precision, steps=steps)


def our_plan(settings: Settings) -> RunPlan:
    """The same job in our words. A packed row of TRL's is cut at the limit; ours refuses it unless told to cut."""
    return plan_run(
        job(
            {
                "model.source": f"file://{settings.model}",
                "data.train": [{"source": f"file://{settings.data}"}],
                "data.eval": [],
                "method.sft": {"maxSeqLength": settings.max_seq_length, "longRows": "truncate"},
                "tuning.lora": {
                    "rank": settings.lora.rank,
                    "alpha": settings.lora.alpha,
                    "targetModules": list(settings.lora.target_modules),
                },
                "training": {
                    "maxSteps": settings.steps,
                    "globalBatchSize": settings.micro_batch_size * settings.accumulation,
                    "microBatchSize": settings.micro_batch_size,
                    "learningRate": settings.learning_rate,
                    "precision": settings.precision,
                    "seed": settings.seed,
                },
                "cluster": {"workers": {"replicas": 1, "cpus": settings.threads}},
            }
        )
    )


def ours(settings: Settings, workdir: Path, use_ray: bool = False) -> Run:
    """`python -m finetune_trainers run`, as `finetune run` starts it."""
    workdir.mkdir(parents=True)
    plan_file = workdir / "given.json"
    plan_file.write_text(our_plan(settings).model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "finetune_trainers", "run", "--plan", str(plan_file), "--workdir", str(workdir)]
    environment = {"OMP_NUM_THREADS": str(settings.threads), "FINETUNE_CACHE": str(workdir / "cache")}
    started = timed_process([*command, "--ray" if use_ray else "--no-ray"], environment, workdir / "process.log")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line["metrics"]]
    steps = [
        Step(end=datetime.fromisoformat(line["time"]).timestamp(), tokens=tokens, trained_tokens=trained)
        for line, (tokens, trained) in zip(logged, _tokens_of_steps(workdir, len(logged)), strict=True)
    ]
    return Run(started, steps, [line["metrics"]["loss"] for line in logged])


def _tokens_of_steps(workdir: Path, num_steps: int) -> list[tuple[int, int]]:
    """Tokens and trained tokens of each step, from the data that the run prepared."""
    from finetune_trainers.data.batches import TrainBatches
    from finetune_trainers.data.order import TrainOrder
    from finetune_trainers.prepared import PreparedRun

    plan = RunPlan.model_validate_json((workdir / "plan.json").read_text())
    prepared = PreparedRun.model_validate_json((workdir / "prepared.json").read_text())
    order = TrainOrder(prepared.data.train, plan.optimization.seed)
    batches = TrainBatches(prepared.data, order, plan.batch, prepared.total_steps, None, rank=0)
    steps = [batches.step(number) for number in range(num_steps)]
    return [(step.num_tokens, step.num_trained_tokens) for step in steps]


def trl(settings: Settings, workdir: Path, variant: str) -> Run:
    """The same with TRL's SFTTrainer, in its own environment; `variant` as in baselines/trl_sft.py."""
    workdir.mkdir(parents=True)
    interpreter = subprocess.run([HERE / "trl_env.sh"], check=True, capture_output=True, text=True).stdout.strip()
    given, result = workdir / "settings.json", workdir / "result.json"
    given.write_text(json.dumps(asdict(settings) | {"variant": variant}))
    environment = {
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_DATASETS_CACHE": str(workdir / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [interpreter, str(HERE / "baselines" / "trl_sft.py"), str(given), str(result)]
    started = timed_process(command, environment, workdir / "process.log")
    document = json.loads(result.read_text())
    seen = [(0, 0)] + [(step["tokens"], step["trained_tokens"]) for step in document["steps"]]
    steps = [
        Step(end=step["end"], tokens=step["tokens"] - before[0], trained_tokens=step["trained_tokens"] - before[1])
        for step, before in zip(document["steps"], seen, strict=False)
    ]
    return Run(started, steps, document["losses"])
