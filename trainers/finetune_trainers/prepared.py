"""What preparation found out, before any worker starts: the hand-over from the driver to the workers.

Written as prepared.json beside plan.json in the run's folder.
"""

from __future__ import annotations

from pydantic import Field

from finetune_api.base import Contract
from finetune_api.plan import LearningRatePlan

__all__ = ["PreparedData", "PreparedModel", "PreparedRun", "PreparedSource"]


class PreparedModel(Contract):
    """A model on this machine's disk, in Hugging Face layout, seen to be whole."""

    folder: str
    tokenizer_folder: str
    chat_template: str | None
    """The Jinja template in use, stored or the tokenizer's own; it is saved with the artifact."""
    num_parameters: int
    vocabulary_size: int
    max_positions: int | None
    digest: str
    """blake3 over the names and contents of the weight files: names this base in adapters."""


class PreparedSource(Contract):
    """One source of rows, tokenized into a folder of the cache."""

    folder: str
    content: str
    """blake3 of what is learned from in the folder: tokens, masks, sequences."""
    source: str
    weight: float
    num_rows: int
    num_rows_dropped: int = 0
    num_sequences: int
    """Packed sequences, or rows when packing is off."""
    num_tokens: int
    num_trained_tokens: int
    """Tokens inside the loss."""
    packing_efficiency: float
    """Tokens / (sequences × maxSeqLength)."""
    from_cache: bool = False


class PreparedData(Contract):
    """All sources, and the figures of the mixture."""

    train: list[PreparedSource]
    eval: list[PreparedSource] = Field(default_factory=list)


class PreparedRun(Contract):
    """The whole hand-over."""

    model: PreparedModel
    data: PreparedData
    sequences_per_epoch: int
    total_steps: int
    learning_rate: LearningRatePlan
    """With `peak` filled in."""
    teacher: PreparedModel | None = None
    """Of a distillation."""
