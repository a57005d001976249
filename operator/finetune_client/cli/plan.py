"""`finetune plan`: what a job would do, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from finetune_api.plan import BatchPlan, RunPlan
from finetune_api.problems import InvalidManifest
from finetune_client.cli.exits import INVALID, OK
from finetune_client.cli.validate import as_errors
from finetune_client.loading import load_one
from finetune_client.overrides import parse_override

__all__ = ["show_plan"]


def show_plan(file: Path, job: str | None, runtimes: Sequence[Path], overrides: Sequence[str], output: str) -> int:
    """Print the plan of the job as `output` (text, json or yaml) and return the exit code."""
    try:
        plan = load_one(file, job, runtimes, [parse_override(text) for text in overrides]).plan
    except InvalidManifest as invalid:
        errors = Console(stderr=True)
        for problem in invalid.problems:
            errors.print(str(problem), markup=False, highlight=False, soft_wrap=True)
        if output == "json":
            print(json.dumps({"valid": False, "errors": as_errors(invalid.problems)}, indent=2, ensure_ascii=False))
        return INVALID
    match output:
        case "json":
            print(plan.model_dump_json(by_alias=True, indent=2))
        case "yaml":
            print(yaml.safe_dump(plan.model_dump(mode="json", by_alias=True), sort_keys=False), end="")
        case _:
            _print_summary(plan)
    return OK


def _print_summary(plan: RunPlan) -> None:
    console = Console(highlight=False)
    for name, text in _lines(plan):
        console.print(f"{name:<14}{text}", markup=False, soft_wrap=True)
    if plan.decisions:
        table = Table("field", "became", "because", title="Decided for you", title_justify="left", box=None)
        for decision in plan.decisions:
            table.add_row(decision.field, decision.value, decision.reason)
        console.print()
        console.print(table)


def _lines(plan: RunPlan) -> list[tuple[str, str]]:
    batch, rate = plan.batch, plan.optimization.learning_rate
    peak = f"{rate.peak:g}" if rate.peak is not None else "decided when the model is read"
    return [
        ("job", f"{plan.namespace}/{plan.name}"),
        ("model", plan.model.source),
        ("data", _data(plan)),
        ("method", f"{_chosen(plan.method.to_document())}, tuning {_chosen(plan.tuning.to_document())}"),
        ("length", _length(plan)),
        ("workers", _workers(plan)),
        ("batch", _batch(batch, plan.method.counted)),
        ("engine", f"{plan.deepspeed.engine}, ZeRO stage {plan.deepspeed.zero_stage}"),
        ("precision", plan.precision),
        ("learning rate", f"{peak}, {rate.schedule}: {rate.reason}"),
        ("artifact", _artifact(plan)),
    ]


def _data(plan: RunPlan) -> str:
    train = ", ".join(source.source for source in plan.data.train)
    evaluation = ", ".join(source.source for source in plan.data.eval) or "none"
    return f"train {train}; eval {evaluation}"


def _chosen(alternatives: dict[str, object]) -> str:
    """The one branch of a union that is set."""
    return next(iter(alternatives))


def _batch(batch: BatchPlan, counted: str) -> str:
    micro, accumulation = batch.micro_batch_size, batch.gradient_accumulation_steps
    product = f"{micro} micro x {accumulation} accumulation x {batch.world_size} processes"
    return f"{product} = {batch.global_batch_size} {counted} per step"


def _length(plan: RunPlan) -> str:
    if plan.optimization.max_steps is not None:
        return f"{plan.optimization.max_steps} optimizer steps"
    return f"{plan.optimization.epochs} epochs"


def _workers(plan: RunPlan) -> str:
    workers = plan.workers
    each = f"{workers.gpus} GPUs each" if workers.gpus else "one CPU process each"
    return f"{workers.replicas} with {each}: world size {workers.world_size}"


def _artifact(plan: RunPlan) -> str:
    places = [f"{output.to} (merged)" if output.merge else output.to for output in plan.outputs]
    here = "artifact/ in the run's folder"
    if not places and plan.storage is None:
        here += "; in a cluster that is lost with the pods: name spec.outputs, or a runtime with a storage"
    return ", ".join([here, *places])
