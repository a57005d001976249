"""What the model learns from, and what it is judged on."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import Contract
from finetune_api.spec.fields import DataUri, only_for_hub

__all__ = ["Columns", "Data", "DataFormat", "DataSource"]


class DataFormat(StrEnum):
    """How a row of data is laid out."""

    AUTO = "auto"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt-completion"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    TEXT = "text"
    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpaired-preference"
    PROMPT = "prompt"


ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


class Columns(Contract):
    """Names of the columns in the data where they differ from the format's own."""

    messages: ColumnName | None = None
    """messages: the list of {role, content}."""
    conversations: ColumnName | None = None
    """sharegpt: the list of {from, value}."""
    prompt: ColumnName | None = None
    """prompt, prompt-completion, both kinds of preference: what the model is given, text or messages."""
    completion: ColumnName | None = None
    """prompt-completion: what the model should answer. unpaired-preference: what it answered."""
    instruction: ColumnName | None = None
    """alpaca: the task."""
    input: ColumnName | None = None
    """alpaca: what the task is about; may be empty."""
    output: ColumnName | None = None
    """alpaca: the answer."""
    system: ColumnName | None = None
    """alpaca, prompt, prompt-completion, sharegpt, both kinds of preference: the row's system message; may be empty."""
    text: ColumnName | None = None
    """text: the document."""
    chosen: ColumnName | None = None
    """preference: the better answer, as text or messages; or, without a prompt, the whole conversation."""
    rejected: ColumnName | None = None
    """preference: the worse answer, in the same way."""
    margin: ColumnName | None = None
    """preference: how much better the chosen answer is, 0 or more, which method.reward puts between scores; may be
    empty."""
    label: ColumnName | None = None
    """unpaired-preference: whether the answer is good, true or false."""


class DataSource(Contract):
    """One source of rows."""

    source: DataUri
    """A file, folder or glob of jsonl, parquet, csv or txt by file:///path, pvc://claim/path or
    package://python_package/path, or a dataset by hf://org/name."""
    split: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Split of an hf:// dataset; `train` when left out."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// dataset."""
    format: DataFormat = DataFormat.AUTO
    """Layout of a row; `auto` goes by the first one's columns. reward, dpo and orpo learn from `preference`, kto from
    `unpaired-preference`, ppo and grpo from `prompt` (rewards get its other columns), the rest from the others."""
    columns: Columns | None = None
    """Column names where they differ from the format's own."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often an epoch has a row: 3 is three times, 0.5 a random half, the next one another half."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Take only the first rows of the source."""

    rules = (only_for_hub("split", "name the file instead"), only_for_hub("revision", "remove it"))


class Data(Contract):
    """What the model learns from, and what it is judged on."""

    train: Annotated[list[DataSource], Field(min_length=1, max_length=32)]
    """Sources of training rows, mixed by their weights."""
    eval: Annotated[list[DataSource], Field(max_length=32)] = Field(default_factory=list)
    """Sources of evaluation rows. Weights are ignored: every row counts once."""
