"""How the model learns: one block for each method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract, exactly_one

__all__ = ["Method", "Sft"]


class Sft(Contract):
    """Supervised fine-tuning: learn to give the answers in the data."""

    max_seq_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Tokens in one training sequence. Packing fills sequences of this length."""
    packing: bool = True
    """Put several rows into one sequence, best fit first. Rows never attend to one another."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """`assistant` trains on the answers only, end-of-turn token included; `all` trains on every token."""
    long_rows: Literal["error", "truncate", "drop"] = "error"
    """What to do with a row longer than maxSeqLength: `error` stops before training and names the rows. Rows of
    format `text` are never refused; they are cut into consecutive sequences."""


class Method(Contract):
    """How the model learns: exactly one."""

    sft: Sft | None = None
    """Supervised fine-tuning."""

    rules = (exactly_one("sft"),)
