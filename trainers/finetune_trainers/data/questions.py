"""What is asked of the model that learns from its own answers, by position in an endless stream. Called by online
methods, on every worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainers.data.cache import SourceArrays
from finetune_trainers.data.order import TrainOrder
from finetune_trainers.data.turns import Message
from finetune_trainers.prepared import PreparedSource

__all__ = ["Question", "Questions"]


@dataclass(frozen=True)
class Question:
    """One prompt."""

    ids: list[int]
    """Ends with the template's generation prompt."""
    messages: list[Message]
    fields: dict[str, Any]
    """The other columns of its row."""
    source: int
    """Index of its source."""
    row: int
    """Index among the source's prompts that were kept."""


class Questions:
    """Prepared sources of format `prompt`: as a stream for training, and row by row."""

    def __init__(self, sources: Sequence[PreparedSource], seed: int) -> None:
        """Raises StorageError when the prepared data cannot be read."""
        self._order = TrainOrder(sources, seed)
        self._sources = [SourceArrays(Path(source.folder)) for source in sources]

    @property
    def per_epoch(self) -> int:
        """Positions of the stream in which every row has had its turn, by its source's weight."""
        return self._order.sequences_per_epoch

    def at(self, position: int) -> Question:
        """The question at `position` >= 0 of the stream, which is in another order in each epoch."""
        _, source, row = self._order.slot(position)
        return self._question(source, row)

    def __len__(self) -> int:
        """Rows of all sources."""
        return sum(source.num_sequences for source in self._sources)

    def __iter__(self) -> Iterator[Question]:
        """Every row once, in the order of the data."""
        for source, arrays in enumerate(self._sources):
            for row in range(arrays.num_sequences):
                yield self._question(source, row)

    def _question(self, source: int, row: int) -> Question:
        arrays = self._sources[source]
        [(start, end)] = arrays.rows_of(row)
        kept = arrays.kept(row)
        return Question(arrays.tokens[start:end].tolist(), kept["messages"], kept["fields"], source, row)
