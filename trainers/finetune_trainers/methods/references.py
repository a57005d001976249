"""What the model said of the data before it learned: log-probabilities of every answer, computed once.

    S  sequences of a source      R  rows of a sequence: two answers of a pair, or an answer and a mismatched one

Called before the first step and before a checkpoint is gone on from, when the model is still the one that was loaded:
new adapters add nothing yet. Each rank computes a part, one sum over the ranks gives all of it to everybody, and rank 0
leaves it beside the tokenized rows. A later attempt, whatever its number of workers, finds the very same figures.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_api.progress import Stage
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch, batches_in_order
from finetune_trainers.data.cache import FileRecord
from finetune_trainers.evaluation import evaluating
from finetune_trainers.methods.log_probs import answers
from finetune_trainers.models import load_dtype
from finetune_trainers.prepared import PreparedModel, PreparedSource

__all__ = ["References"]

CODE_VERSION = 1
"""Counts up with every change that gives other figures for the same model and rows."""
_ROWS = 2


class References:
    """The reference's log-probabilities (nats, sums over trained tokens) of all sequences of some sources."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        """`tables`: fp32 [S, R] for each source."""
        self._tables = tables

    @classmethod
    def of(
        cls,
        sources: Sequence[PreparedSource],
        module: nn.Module,
        model: PreparedModel,
        plan: RunPlan,
        context: WorkerContext,
    ) -> References:
        """Of `sources` by `module` as it is, or from the cache. Collective."""
        files = [Path(source.folder) / f"reference-{_key(model, plan)}.npy" for source in sources]
        known = [_read(file) for file in files] if context.rank == 0 else None
        known = context.broadcast_object(known)
        assert known is not None
        tables = {index: torch.from_numpy(table) for index, table in enumerate(known) if table is not None}
        missing = [index for index in range(len(sources)) if index not in tables]
        made = _compute([sources[index] for index in missing], module, plan, context)
        for index, table in zip(missing, made, strict=True):
            tables[index] = table
            if context.rank == 0:
                _write(files[index], table.numpy())
        return cls([tables[index] for index in range(len(sources))])

    def attach(self, batch: Batch) -> Batch:
        """`batch` with the figures of its sequences. A batch without sequences stays as it is."""
        if not batch.slots:
            return batch
        return replace(batch, references=torch.stack([self._tables[source][seq] for source, seq in batch.slots]))


def _compute(
    sources: Sequence[PreparedSource], module: nn.Module, plan: RunPlan, context: WorkerContext
) -> list[Tensor]:
    """fp32 [S, R] for each source; which sequences share a forward pass does not depend on the number of ranks."""
    tables = [torch.zeros(source.num_sequences, _ROWS, dtype=torch.float64) for source in sources]
    total = sum(source.num_sequences for source in sources)
    micro = plan.batch.micro_batch_size
    with evaluating(module), torch.no_grad():
        batches = batches_in_order(sources, micro, context.world_size, context.rank)
        for number, batch in enumerate(batches):
            found = answers(module, batch.to(context.device)).log_probs.double().cpu()
            for place, (source, seq) in enumerate(batch.slots):
                tables[source][seq] = found[_ROWS * place : _ROWS * (place + 1)]
            done = min(100, 100 * (number + 1) * micro * context.world_size // max(total, 1))
            context.report(Stage.LOADING_MODEL, percent=float(done), message="Asking the reference about the data")
    return [context.all_reduce_sum(table.to(context.device)).cpu().float() for table in tables]


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


def _read(file: Path) -> NDArray[np.float32] | None:
    """What an earlier attempt left, if it is whole."""
    try:
        record = FileRecord.model_validate_json(file.with_suffix(".json").read_bytes())
        data = file.read_bytes()
        if len(data) != record.bytes or blake3(data).hexdigest() != record.digest:
            return None
        table: NDArray[np.float32] = np.load(BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, ValidationError):
        return None
    return table


def _write(file: Path, table: NDArray[np.float32]) -> None:
    """A cache that cannot be written to costs the next attempt some time, and this one nothing."""
    stream = BytesIO()
    np.save(stream, table, allow_pickle=False)
    data = stream.getvalue()
    record = FileRecord(bytes=len(data), digest=blake3(data).hexdigest())
    with suppress(OSError):
        _replace(file, data)
        _replace(file.with_suffix(".json"), record.model_dump_json().encode())


def _replace(file: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    Path(name).chmod(0o644)
    Path(name).replace(file)
