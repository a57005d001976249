"""From a row as it stands in a file to what the model learns from: a conversation, a document, answers or a question.

Called by `prepare` and `prompts` for every row. A row that does not fit raises RowError with the field inside
the row, what was found there and what would be right; nothing is guessed, mended or skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from finetune_api.spec import DataFormat, DataSource
from finetune_trainers.data.asking import read_prompt
from finetune_trainers.data.faults import RowError, shorten
from finetune_trainers.data.preferences import Preference, Rated, read_preference, read_rated
from finetune_trainers.data.turns import (
    Conversation,
    Document,
    Item,
    Message,
    in_order,
    list_of_turns,
    messages_of,
    required_text,
    with_system,
)

__all__ = ["CONTINUES", "Conversation", "Document", "Item", "Message", "Row", "RowFormat", "choose_format"]

CONTINUES = "\0continues"
"""Key of a row that is not the end of its document: a long text file is read in blocks."""


Row: TypeAlias = Item | Preference | Rated
"""What a format makes of a row."""

# Columns that a format must find, and those that it may find. The names are keys of the contract's `Columns`
# too.
REQUIRED: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.SHAREGPT: ("conversations",),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
    DataFormat.PREFERENCE: ("chosen", "rejected"),
    DataFormat.UNPAIRED_PREFERENCE: ("prompt", "completion", "label"),
    DataFormat.PROMPT: ("prompt",),
}
OPTIONAL: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.SHAREGPT: ("system",),
    DataFormat.ALPACA: ("input", "system"),
    DataFormat.PROMPT_COMPLETION: ("system",),
    DataFormat.PREFERENCE: ("prompt", "system", "margin"),
    DataFormat.UNPAIRED_PREFERENCE: ("system",),
    DataFormat.PROMPT: ("system",),
}
ANSWERED = frozenset(REQUIRED) - {DataFormat.PROMPT}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class RowFormat:
    """A format with the names that its columns have in one source."""

    format: DataFormat
    names: Mapping[str, str]
    """The format's own column name -> the name in the data."""

    def read(self, row: Any) -> Row:
        """The row as a conversation, a document, answers that were judged, or a question. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError('is not an object with columns; write {"column": value}', value=shorten(row))
        for column in REQUIRED[self.format]:
            if self.names[column] not in row:
                raise RowError(
                    f"has no column {self.names[column]!r}, which the format {self.format} needs; "
                    f"the columns are {_listed(row)}",
                    path=self.names[column],
                )
        return _READERS[self.format](self, row)

    def text(self, row: dict[str, Any], column: str) -> str:
        """The text of a required column."""
        name = self.names[column]
        return required_text(row[name], name)

    def optional_text(self, row: dict[str, Any], column: str) -> str:
        """The text of a column that may be absent, null or empty."""
        name = self.names[column]
        value = row.get(name)
        if value is None:
            return ""
        if isinstance(value, str) and not value.strip():
            return ""
        return required_text(value, name)


def choose_format(source: DataSource, first_row: Any, known: Collection[DataFormat] = ANSWERED) -> RowFormat:
    """The format of `source`: the one it names, or the only one of `known` whose columns are in `first_row`.

    Raises RowError; its path, if any, is a field of the source (`format`, `columns.text`).
    """
    mapped: dict[str, str] = source.columns.model_dump(exclude_none=True) if source.columns else {}
    chosen: DataFormat = source.format
    if chosen is DataFormat.AUTO:
        if not isinstance(first_row, dict):
            raise RowError('is not an object with columns; write {"column": value}', value=shorten(first_row))
        chosen = _detect(first_row, mapped, known)
    columns = (*REQUIRED[chosen], *OPTIONAL.get(chosen, ()))
    for column in mapped:
        if column not in columns:
            raise RowError(
                f"is not a column of the format {chosen}, which has {', '.join(columns)}; remove it",
                f"columns.{column}",
                shorten(mapped[column]),
            )
    return RowFormat(chosen, {column: mapped.get(column, column) for column in columns})


def _detect(first_row: dict[str, Any], mapped: Mapping[str, str], known: Collection[DataFormat]) -> DataFormat:
    all_fitting = [
        format_
        for format_, columns in REQUIRED.items()
        if all(mapped.get(column, column) in first_row for column in columns)
        and set(mapped) <= {*columns, *OPTIONAL.get(format_, ())}
    ]
    fitting = [format_ for format_ in all_fitting if format_ in known]
    judged = DataFormat.UNPAIRED_PREFERENCE
    if judged in all_fitting and judged not in known and isinstance(first_row[mapped.get("label", "label")], bool):
        what = "has a label that says whether the answer is good, and the job's method would learn from bad ones too"
        raise RowError(f"{what}; leave out the bad ones and name the format, or use method.kto", "format", "auto")
    if len(fitting) == 1:
        return fitting[0]
    found = f"the columns are {_listed(first_row)}"
    if fitting:
        raise RowError(f"fits more than one format: {found}; set it to {' or '.join(fitting)}", "format", "auto")
    if all_fitting:
        found += f", which is {all_fitting[0]}, and the job's method does not learn from that"
    listed = "; ".join(f"{form}: {' and '.join(columns)}" for form, columns in REQUIRED.items() if form in known)
    raise RowError(f"fits no format: {found}. Known are {listed}. Name yours under columns", "format", "auto")


def _read_messages(form: RowFormat, row: dict[str, Any]) -> Item:
    name = form.names["messages"]
    return Conversation(in_order(messages_of(row[name], name), name))


def _read_sharegpt(form: RowFormat, row: dict[str, Any]) -> Item:
    name = form.names["conversations"]
    messages = []
    for index, raw in enumerate(list_of_turns(row[name], name)):
        path = f"{name}[{index}]"
        if "from" not in raw and "role" in raw:
            raise RowError(
                f"has role and content; set format: messages and columns.messages: {name}", path, shorten(raw)
            )
        speaker = required_text(raw.get("from"), f"{path}.from")
        if speaker not in SHAREGPT_ROLES:
            raise RowError(f"must be one of {', '.join(SHAREGPT_ROLES)}", f"{path}.from", shorten(speaker))
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": required_text(raw.get("value"), f"{path}.value")})
    system = form.optional_text(row, "system")
    if system and messages[0]["role"] == "system":
        raise RowError("stands beside a system message in the conversation; keep one", form.names["system"])
    return Conversation(in_order(with_system(system, messages), name, 1 if system else 0))


def _read_alpaca(form: RowFormat, row: dict[str, Any]) -> Item:
    task = form.text(row, "instruction")
    about = form.optional_text(row, "input")
    return _exchange(form, row, f"{task}\n\n{about}" if about else task, form.text(row, "output"))


def _read_prompt_completion(form: RowFormat, row: dict[str, Any]) -> Item:
    return _exchange(form, row, form.text(row, "prompt"), form.text(row, "completion"))


def _exchange(form: RowFormat, row: dict[str, Any], user: str, assistant: str) -> Conversation:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Conversation(with_system(form.optional_text(row, "system"), messages))


def _read_text(form: RowFormat, row: dict[str, Any]) -> Item:
    return Document(form.text(row, "text"), continues=CONTINUES in row)


_READERS: dict[DataFormat, Callable[[RowFormat, dict[str, Any]], Row]] = {
    DataFormat.MESSAGES: _read_messages,
    DataFormat.SHAREGPT: _read_sharegpt,
    DataFormat.ALPACA: _read_alpaca,
    DataFormat.PROMPT_COMPLETION: _read_prompt_completion,
    DataFormat.TEXT: _read_text,
    DataFormat.PREFERENCE: read_preference,
    DataFormat.UNPAIRED_PREFERENCE: read_rated,
    DataFormat.PROMPT: read_prompt,
}


def _listed(row: Iterable[str]) -> str:
    return ", ".join(str(column) for column in row) or "none"
