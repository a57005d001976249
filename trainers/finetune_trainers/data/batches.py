"""The batches of a run: every worker reads its own out of the prepared data, by step number and rank alone.

A batch is padding-free: documents lie end to end in one row of tokens, and `cu_seqlens` says where each
begins. Which sequences make up the global batch of a step does not depend on the number of workers, only who
computes them. Called by the training loop and by evaluation.

    G  sequences of a global batch = micro batch × accumulation steps × world size
    T  tokens of a micro-batch, D documents in it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from finetune_api.plan import BatchPlan
from finetune_trainers.data.cache import SourceArrays
from finetune_trainers.data.order import TrainOrder
from finetune_trainers.prepared import PreparedData, PreparedSource

__all__ = [
    "IGNORED",
    "Batch",
    "StepBatches",
    "TrainBatches",
    "all_sequences",
    "batches_in_order",
    "batches_of",
    "dummy_batch",
    "eval_batches",
]

IGNORED = -100
"""Label of a position that is not trained; torch's cross-entropy skips it."""
_ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    input_ids: Tensor
    """int64 [1, T]"""
    labels: Tensor
    """int64 [1, T], shifted: what position t must predict; IGNORED where nothing is trained."""
    position_ids: Tensor
    """int64 [1, T]; from 0 in every document."""
    cu_seqlens: Tensor
    """int32 [D + 1]; document d is tokens cu_seqlens[d] to cu_seqlens[d + 1]."""
    max_seqlen: int
    """Tokens of the longest document."""
    num_trained_tokens: int
    """Positions with a label."""
    slots: tuple[tuple[int, int], ...] = ()
    """(source, sequence) of the sequences that the documents are of, in order."""
    marks: Tensor | None = None
    """float32, one for each of `slots`: what the data says of the sequence, where it says something."""
    references: Tensor | None = None
    """float32 [slots, rows of a sequence]: log-probabilities by the reference model, where a method has one."""

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=True),
            marks=None if self.marks is None else self.marks.to(device, non_blocking=True),
            references=None if self.references is None else self.references.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class StepBatches:
    """One rank's part of one optimizer step."""

    micro_batches: list[Batch]
    """As many as there are accumulation steps, on every rank."""
    num_trained_tokens: int
    """Of the whole global batch, over all ranks."""
    num_tokens: int
    """Of the whole global batch, trained or not."""
    num_sequences: int | None = None
    """Of the whole global batch, where each counts the same in the loss; None: each trained token does."""
    is_left_out: bool = False
    """The method learns nothing in this step: there are no micro-batches, and no update is made."""

    @property
    def divisor(self) -> int:
        """What the summed loss of the global batch is divided by. A step may hold nothing to learn: at least 1."""
        return max(self.num_trained_tokens if self.num_sequences is None else self.num_sequences, 1)


class TrainBatches:
    """Random access to the steps of a run."""

    def __init__(
        self,
        prepared: PreparedData,
        order: TrainOrder,
        batch: BatchPlan,
        total_steps: int,
        total_sequences: int | None,
        rank: int,
        by_sequence: bool = False,
        rows: slice = _ALL_ROWS,
    ) -> None:
        """`total_sequences`: stream positions from there on are empty, None for never. `by_sequence`: the loss is a
        mean over sequences. `rows`: those of each sequence that become documents. Raises StorageError."""
        self.total_steps = total_steps
        self._order = order
        self._batch = batch
        self._total_sequences = total_sequences
        self._rank = rank
        self._by_sequence = by_sequence
        self._rows = rows
        self._sources = [SourceArrays(Path(source.folder)) for source in prepared.train]

    def step(self, step: int) -> StepBatches:
        """The batches of optimizer step `step`, counted from 0."""
        positions = range(self._position(step), self._position(step + 1))
        slots = [self._order.slot(position)[1:] for position in positions]
        return StepBatches(
            micro_batches=[
                _batch_of(self._sources, self._own_slots(slots, micro_step), self._rows)
                for micro_step in range(self._batch.gradient_accumulation_steps)
            ],
            num_trained_tokens=sum(int(self._sources[source].sequence_trained[seq]) for source, seq in slots),
            num_tokens=sum(int(self._sources[source].sequence_tokens[seq]) for source, seq in slots),
            num_sequences=len(slots) if self._by_sequence else None,
        )

    def visited(self) -> list[tuple[int, int]]:
        """(source, sequence) of all that the steps of the run hold, each once, in the order of the first visit."""
        return self._order.visited(self._position(self.total_steps))

    def _position(self, step: int) -> int:
        """In the stream, where `step` begins."""
        position = step * self._batch.global_batch_size
        return position if self._total_sequences is None else min(position, self._total_sequences)

    def _own_slots(self, slots: list[tuple[int, int]], micro_step: int) -> list[tuple[int, int]]:
        micro = self._batch.micro_batch_size
        start = micro_step * micro * self._batch.world_size + self._rank * micro
        return slots[start : start + micro]


def eval_batches(
    prepared: PreparedData, micro_batch_size: int, world_size: int, rank: int, rows: slice = _ALL_ROWS
) -> Iterator[Batch]:
    """This rank's part of the evaluation data: every row once over all ranks, and the same number of batches
    on each, because a sharded model needs all ranks in every forward pass."""
    yield from batches_in_order(prepared.eval, micro_batch_size, world_size, rank, rows)


def batches_in_order(
    prepared: Sequence[PreparedSource], micro_batch_size: int, world_size: int, rank: int, rows: slice = _ALL_ROWS
) -> Iterator[Batch]:
    """The same of any sources."""
    yield from batches_of(prepared, all_sequences(prepared), micro_batch_size, world_size, rank, rows)


def all_sequences(prepared: Sequence[PreparedSource]) -> list[tuple[int, int]]:
    """(source, sequence) of all of `prepared`, in order."""
    return [(index, seq) for index, source in enumerate(prepared) for seq in range(source.num_sequences)]


def batches_of(
    prepared: Sequence[PreparedSource],
    slots: Sequence[tuple[int, int]],
    micro_batch_size: int,
    world_size: int,
    rank: int,
    rows: slice = _ALL_ROWS,
) -> Iterator[Batch]:
    """The same of the sequences in `slots` (source, sequence). Which of them share a batch does not depend on the
    number of ranks."""
    sources = [SourceArrays(Path(source.folder)) for source in prepared]
    for start in range(0, len(slots), micro_batch_size * world_size):
        own = start + rank * micro_batch_size
        yield _batch_of(sources, slots[own : own + micro_batch_size], rows)


def _batch_of(sources: Sequence[SourceArrays], slots: Sequence[tuple[int, int]], rows: slice) -> Batch:
    """The rows of the sequences in `slots` (source, sequence), laid end to end."""
    parts = [
        (sources[source], start, end) for source, seq in slots for start, end in sources[source].rows_of(seq)[rows]
    ]
    if not parts:
        return dummy_batch()
    lengths = [end - start for _, start, end in parts]
    ids = np.concatenate([arrays.tokens[start:end] for arrays, start, end in parts]).astype(np.int64)
    trained = np.concatenate([arrays.trained[start:end] for arrays, start, end in parts])
    # The first token of a document is never trained, so shifting by one never crosses from one into the next.
    labels = np.full_like(ids, IGNORED)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORED)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_seqlen=max(lengths),
        num_trained_tokens=int(trained.sum()),
        slots=tuple(slots),
        marks=_marks(sources, slots),
    )


def _marks(sources: Sequence[SourceArrays], slots: Sequence[tuple[int, int]]) -> Tensor | None:
    marks = [sources[source].marks for source, _ in slots]
    if any(one is None for one in marks):
        return None
    return torch.tensor([float(one[seq]) for one, (_, seq) in zip(marks, slots, strict=True) if one is not None])


def dummy_batch() -> Batch:
    """One token without a label, for a rank that has nothing left but must take part in the forward pass."""
    return Batch(
        input_ids=torch.zeros((1, 1), dtype=torch.int64),
        labels=torch.full((1, 1), IGNORED, dtype=torch.int64),
        position_ids=torch.zeros((1, 1), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        max_seqlen=1,
        num_trained_tokens=0,
    )
