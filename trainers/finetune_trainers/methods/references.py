"""What the model said of the data before it learned: log-probabilities of the answers it will come by, computed once.

    S  sequences of a source      R  rows of a sequence: two answers of a pair, or an answer and a mismatched one

Called before the first step and before a checkpoint is gone on from, when the model is still the one that was loaded:
new adapters add nothing yet. Each rank computes a part, one sum over the ranks gives all of it to everybody, and rank 0
leaves it beside the tokenized rows. A later attempt, whatever its number of workers, finds the very same figures, and
one that trains for longer asks for those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_api.progress import Stage
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch, batches_of
from finetune_trainers.data.kept import keep, read_kept
from finetune_trainers.evaluation import evaluating
from finetune_trainers.methods.log_probs import answers
from finetune_trainers.models import load_dtype
from finetune_trainers.prepared import PreparedModel, PreparedSource

__all__ = ["References"]

CODE_VERSION = 2
"""Counts up with every change that gives other figures for the same model and rows."""
_ROWS = 2


class References:
    """The reference's log-probabilities (nats, sums over trained tokens) of sequences of some sources."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        """`tables`: fp32 [S, R] for each source, NaN where nothing was asked."""
        self._tables = tables

    @classmethod
    def of(
        cls,
        sources: Sequence[PreparedSource],
        slots: Sequence[tuple[int, int]],
        module: nn.Module,
        model: PreparedModel,
        plan: RunPlan,
        context: WorkerContext,
    ) -> References:
        """Of the sequences in `slots` (source, sequence), each named once, by `module` as it is, or from the cache.
        Collective."""
        files = [Path(source.folder) / f"reference-{_key(model, plan)}.npy" for source in sources]
        known = [read_kept(file) for file in files] if context.rank == 0 else None
        known = context.broadcast_object(known)
        assert known is not None
        tables = [
            np.full((source.num_sequences, _ROWS), np.nan, dtype=np.float32) if table is None else table
            for source, table in zip(sources, known, strict=True)
        ]
        is_missing = [np.isnan(table[:, 0]) for table in tables]
        missing = [(source, seq) for source, seq in slots if is_missing[source][seq]]
        if missing:
            made = _compute(sources, missing, module, plan, context).numpy()
            for (source, seq), found in zip(missing, made, strict=True):
                tables[source][seq] = found
            if context.rank == 0:
                for source in {source for source, _ in missing}:
                    keep(files[source], tables[source])
        return cls([torch.from_numpy(table) for table in tables])

    def attach(self, batch: Batch) -> Batch:
        """`batch` with the figures of its sequences. A batch without sequences stays as it is."""
        if not batch.slots:
            return batch
        return replace(batch, references=torch.stack([self._tables[source][seq] for source, seq in batch.slots]))


def _compute(
    sources: Sequence[PreparedSource],
    slots: Sequence[tuple[int, int]],
    module: nn.Module,
    plan: RunPlan,
    context: WorkerContext,
) -> Tensor:
    """fp32 [slots, R]; which sequences share a forward pass does not depend on the number of ranks."""
    table = torch.zeros(len(slots), _ROWS, dtype=torch.float64)
    micro = plan.batch.micro_batch_size
    with evaluating(module), torch.no_grad():
        batches = batches_of(sources, slots, micro, context.world_size, context.rank)
        for number, batch in enumerate(batches):
            found = answers(module, batch.to(context.device)).log_probs.double().cpu()
            first = (number * context.world_size + context.rank) * micro
            own = table[first : first + micro]
            own += found[: own.numel()].view_as(own)
            done = min(100, 100 * (number + 1) * micro * context.world_size // len(slots))
            context.report(Stage.LOADING_MODEL, percent=float(done), message="Asking the reference about the data")
    return context.all_reduce_sum(table.to(context.device)).cpu().float()


def _key(model: PreparedModel, plan: RunPlan) -> str:
    """What decides the figures beside the rows, which name the folder."""
    lora = plan.tuning.lora
    facts = {
        "version": CODE_VERSION,
        "model": model.digest,
        "precision": plan.precision,
        "held_in": str(load_dtype(plan)),
        "quantization": lora.quantization if lora is not None else None,
        "device": plan.workers.device,
    }
    return blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
