"""From a row as it stands in a file to what the model learns from: a conversation or a document.

Called by `prepare` and `prompts` for every row. A row that does not fit raises RowError with the field inside
the row, what was found there and what would be right; nothing is guessed, mended or skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from finetune_api.spec import DataFormat, DataSource
from finetune_trainers.data.faults import RowError, shorten

__all__ = ["CONTINUES", "Conversation", "Document", "Item", "Message", "RowFormat", "choose_format"]

Message: TypeAlias = dict[str, str]
"""`role` (system, user or assistant) and `content`; `reasoning_content` where the data has it."""

CONTINUES = "\0continues"
"""Key of a row that is not the end of its document: a long text file is read in blocks."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system message or none, then user and assistant in turn, the assistant last."""

    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Document:
    """Running text."""

    text: str
    continues: bool = False
    """The next row goes on with the same document: no end-of-sequence token after this one."""


Item: TypeAlias = Conversation | Document

# Columns that a format must find, and those that it may find. The names are keys of the contract's `Columns`
# too.
REQUIRED: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.SHAREGPT: ("conversations",),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
}
OPTIONAL: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.SHAREGPT: ("system",),
    DataFormat.ALPACA: ("input", "system"),
    DataFormat.PROMPT_COMPLETION: ("system",),
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
REASONING_KEYS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class RowFormat:
    """A format with the names that its columns have in one source."""

    format: DataFormat
    names: Mapping[str, str]
    """The format's own column name -> the name in the data."""

    def read(self, row: Any) -> Item:
        """The row as a conversation or a document. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError("is not an object with columns", value=shorten(row))
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
        return _required_text(row[name], name)

    def optional_text(self, row: dict[str, Any], column: str) -> str:
        """The text of a column that may be absent, null or empty."""
        name = self.names[column]
        value = row.get(name)
        if value is None:
            return ""
        if isinstance(value, str) and not value.strip():
            return ""
        return _required_text(value, name)


def choose_format(source: DataSource, first_row: Any) -> RowFormat:
    """The format of `source`: the one it names, or the only one whose columns are in `first_row`.

    Raises RowError; its path, if any, is a field of the source (`format`, `columns.text`).
    """
    mapped: dict[str, str] = source.columns.model_dump(exclude_none=True) if source.columns else {}
    chosen: DataFormat = source.format
    if chosen is DataFormat.AUTO:
        if not isinstance(first_row, dict):
            raise RowError("is not an object with columns", value=shorten(first_row))
        chosen = _detect(first_row, mapped)
    columns = (*REQUIRED[chosen], *OPTIONAL.get(chosen, ()))
    for column in mapped:
        if column not in columns:
            raise RowError(
                f"is not a column of the format {chosen}, which has {', '.join(columns)}; remove it",
                f"columns.{column}",
                shorten(mapped[column]),
            )
    return RowFormat(chosen, {column: mapped.get(column, column) for column in columns})


def _detect(first_row: dict[str, Any], mapped: Mapping[str, str]) -> DataFormat:
    fitting = [
        format_
        for format_, columns in REQUIRED.items()
        if all(mapped.get(column, column) in first_row for column in columns)
        and set(mapped) <= {*columns, *OPTIONAL.get(format_, ())}
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = f"the columns are {_listed(first_row)}"
    if fitting:
        raise RowError(f"fits more than one format: {found}; set it to {' or '.join(fitting)}", "format", "auto")
    known = "; ".join(f"{format_}: {' and '.join(columns)}" for format_, columns in REQUIRED.items())
    raise RowError(f"fits no format: {found}. Known are {known}. Name yours under columns", "format", "auto")


def _read_messages(form: RowFormat, row: dict[str, Any]) -> Item:
    name = form.names["messages"]
    messages = []
    for index, raw in enumerate(_list_of_turns(row[name], name)):
        path = f"{name}[{index}]"
        if "role" not in raw and "from" in raw:
            raise RowError("has from and value; set format: sharegpt", path, shorten(raw))
        for key in ("tool_calls", "function_call"):
            if raw.get(key):
                raise RowError("calls a tool, which this version cannot train on; remove the row", f"{path}.{key}")
        message = {
            "role": _required_text(raw.get("role"), f"{path}.role"),
            "content": _content(raw.get("content"), f"{path}.content"),
        }
        reasoning = next((raw[key] for key in REASONING_KEYS if raw.get(key)), None)
        if reasoning is not None:
            # Templates read either name.
            message |= dict.fromkeys(REASONING_KEYS, _required_text(reasoning, f"{path}.reasoning_content"))
        messages.append(message)
    return Conversation(_in_order(messages, name))


def _read_sharegpt(form: RowFormat, row: dict[str, Any]) -> Item:
    name = form.names["conversations"]
    messages = []
    for index, raw in enumerate(_list_of_turns(row[name], name)):
        path = f"{name}[{index}]"
        if "from" not in raw and "role" in raw:
            raise RowError(
                f"has role and content; set format: messages and columns.messages: {name}", path, shorten(raw)
            )
        speaker = _required_text(raw.get("from"), f"{path}.from")
        if speaker not in SHAREGPT_ROLES:
            raise RowError(f"must be one of {', '.join(SHAREGPT_ROLES)}", f"{path}.from", shorten(speaker))
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": _required_text(raw.get("value"), f"{path}.value")})
    system = form.optional_text(row, "system")
    if system and messages[0]["role"] == "system":
        raise RowError("stands beside a system message in the conversation; keep one", form.names["system"])
    return Conversation(_in_order(_with_system(system, messages), name, 1 if system else 0))


def _read_alpaca(form: RowFormat, row: dict[str, Any]) -> Item:
    task = form.text(row, "instruction")
    about = form.optional_text(row, "input")
    return _exchange(form, row, f"{task}\n\n{about}" if about else task, form.text(row, "output"))


def _read_prompt_completion(form: RowFormat, row: dict[str, Any]) -> Item:
    return _exchange(form, row, form.text(row, "prompt"), form.text(row, "completion"))


def _exchange(form: RowFormat, row: dict[str, Any], user: str, assistant: str) -> Conversation:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Conversation(_with_system(form.optional_text(row, "system"), messages))


def _read_text(form: RowFormat, row: dict[str, Any]) -> Item:
    return Document(form.text(row, "text"), continues=CONTINUES in row)


_READERS = {
    DataFormat.MESSAGES: _read_messages,
    DataFormat.SHAREGPT: _read_sharegpt,
    DataFormat.ALPACA: _read_alpaca,
    DataFormat.PROMPT_COMPLETION: _read_prompt_completion,
    DataFormat.TEXT: _read_text,
}


def _with_system(system: str, messages: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system else messages


def _in_order(messages: list[Message], name: str, offset: int = 0) -> list[Message]:
    """`messages` when their roles are in order; `offset` counts those that are not in the data's list."""
    expected = "user"
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and index == 0:
            continue
        if role != expected:
            path = f"{name}[{index - offset}]"
            raise RowError(f"{_why_not(role, expected)}", path, shorten(role))
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != "assistant":
        path = f"{name}[{len(messages) - 1 - offset}]"
        raise RowError("is the last message and must be the assistant's", path, shorten(messages[-1]["role"]))
    return messages


def _why_not(role: str, expected: str) -> str:
    if role in ("tool", "function", "ipython"):
        return "is a tool's message, which this version cannot train on; remove the row"
    if role == "system":
        return "is a system message; only the first message may be one"
    if role not in ("user", "assistant"):
        return "has an unknown role; use system, user or assistant"
    return f"must be the {expected}'s: after an optional system message user and assistant take turns"


def _list_of_turns(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RowError("must be a list of messages", name, shorten(value))
    if not value:
        raise RowError("is empty; it must hold at least a user's and an assistant's message", name, "[]")
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RowError("must be an object", f"{name}[{index}]", shorten(turn))
    return value


def _content(value: Any, path: str) -> str:
    """The text of a message: a string, or OpenAI's list of parts when all of them are text."""
    if not isinstance(value, list):
        return _required_text(value, path)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError("is not text; only parts of type text can be trained on", f"{path}[{index}]", shorten(part))
        texts.append(_required_text(part.get("text"), f"{path}[{index}].text"))
    return _required_text("".join(texts), path)


def _required_text(value: Any, path: str) -> str:
    if isinstance(value, str) and value.strip():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError("holds half of a surrogate pair, which is no character", path, shorten(value)) from None
        return value
    if value is None:
        raise RowError("is missing; it must be text", path)
    if not isinstance(value, str):
        raise RowError(f"must be text, not {_kind(value)}", path, shorten(value))
    raise RowError("is empty", path, shorten(value))


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _listed(row: Iterable[str]) -> str:
    return ", ".join(str(column) for column in row) or "none"
