"""The loop that everybody would write with transformers and torch alone: what the trainers are held against.

No packing, no engine, no workers: each document is one forward pass, the loss is the mean over the trained tokens of
the whole global batch, the optimizer is torch's AdamW, clipping is torch's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from finetune_api.plan import RunPlan
from finetune_api.spec import Distill
from finetune_trainers.data.batches import Batch, TrainBatches
from finetune_trainers.data.order import TrainOrder
from finetune_trainers.lean_peft import peft
from finetune_trainers.prepared import PreparedRun

__all__ = ["divergence", "documents", "metrics_of", "train"]


def train(plan: RunPlan, prepared: PreparedRun) -> list[dict[str, float]]:
    """loss and grad_norm of each step."""
    model: nn.Module = _load(prepared.model.folder)
    teacher = _load(prepared.teacher.folder) if prepared.teacher is not None else None
    if plan.tuning.lora is not None:
        model = _with_adapters(model, plan)
    settings = plan.optimization.adamw
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    curve = []
    for step, batch in enumerate(_global_batches(plan, prepared)):
        for group in optimizer.param_groups:
            group["lr"] = _rate(plan, step, prepared.total_steps)
        loss = _mean_loss(model, batch, plan.method.distill, teacher)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trained, plan.optimization.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"loss": loss.item(), "grad_norm": norm.item()})
    return curve


def _load(folder: str) -> nn.Module:
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return loaded


def _with_adapters(model: Any, plan: RunPlan) -> nn.Module:
    lora = plan.tuning.lora
    assert lora is not None
    targets = "all-linear" if lora.target_modules == ["all-linear"] else lora.target_modules
    torch.manual_seed(plan.optimization.seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=int(lora.alpha), target_modules=targets)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _global_batches(plan: RunPlan, prepared: PreparedRun) -> Iterator[Batch]:
    """The whole global batch of each step as one batch of one worker."""
    total = plan.batch.global_batch_size
    alone = plan.batch.model_copy(update={"micro_batch_size": total, "gradient_accumulation_steps": 1, "world_size": 1})
    epochs = plan.optimization.epochs
    batches = TrainBatches(
        prepared.data,
        TrainOrder(prepared.data.train, plan.optimization.seed),
        alone,
        prepared.total_steps,
        None if epochs is None else epochs * prepared.sequences_per_epoch,
        rank=0,
    )
    for step in range(prepared.total_steps):
        yield batches.step(step).micro_batches[0]


def documents(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input ids [1, T], labels [1, T]) of each document of a batch."""
    ends = batch.cu_seqlens.tolist()
    for start, end in pairwise(ends):
        yield batch.input_ids[:, start:end], batch.labels[:, start:end]


def _mean_loss(
    model: nn.Module, batch: Batch, distill: Distill | None = None, teacher: nn.Module | None = None
) -> torch.Tensor:
    total = torch.zeros(())
    for input_ids, labels in documents(batch):
        logits = model(input_ids=input_ids).logits[0]
        of_data = nn.functional.cross_entropy(logits, labels[0], ignore_index=-100, reduction="sum")
        if distill is not None and teacher is not None:
            trained = labels[0] != -100
            with torch.no_grad():
                taught = teacher(input_ids=input_ids).logits[0]
            distance = divergence(logits[trained], taught[trained], distill).sum()
            of_data = (1 - distill.alpha) * distill.temperature**2 * distance + distill.alpha * of_data
        total = total + of_data
    return total / (batch.labels != -100).sum()


def divergence(student: Tensor, teacher: Tensor, distill: Distill) -> Tensor:
    """[K] of logits [K, V], with torch's own functions and whole softmaxes."""
    s, t = ((logits / distill.temperature).log_softmax(-1) for logits in (student, teacher))

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return nn.functional.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if distill.divergence != "jsd":
        return kl(t, s) if distill.divergence == "forward-kl" else kl(s, t)
    beta = distill.beta or 0.5
    mixed = ((1 - beta) * s.exp() + beta * t.exp()).log()
    return beta * kl(t, mixed) + (1 - beta) * kl(s, mixed)


def _rate(plan: RunPlan, step: int, total: int) -> float:
    """Linear warm-up, then linear decay: the only schedule that the parity tests use."""
    rate = plan.optimization.learning_rate
    assert rate.schedule == "linear"
    assert rate.peak is not None
    warmup = math.ceil(rate.warmup_fraction * total)
    if step < warmup:
        return rate.peak * (step + 1) / (warmup + 1)
    return rate.peak * (total - step) / (total - warmup)


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Figures of each optimizer step of one of our runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(line["metrics"])
    return [steps[step] for step in sorted(steps) if step > 0]
