"""Conversations: messages in order of their roles, checked one by one. Called by `formats`, `preferences` and
`asking`.

What does not fit raises RowError with its place in the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from finetune_trainers.data.faults import RowError, shorten

__all__ = [
    "Conversation",
    "Document",
    "Item",
    "Message",
    "Prompt",
    "in_order",
    "kind_of",
    "list_of_turns",
    "messages_of",
    "required_text",
    "with_system",
]

Message: TypeAlias = dict[str, str]
"""`role` (system, user or assistant) and `content`; `reasoning_content` where the data has it."""

REASONING_KEYS = ("reasoning_content", "thinking")


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


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the user's message ends, and what else the data says of it."""

    messages: list[Message]
    fields: dict[str, Any]
    """The row's other columns; JSON."""


Item: TypeAlias = Conversation | Document | Prompt


def messages_of(value: Any, name: str) -> list[Message]:
    """The list of {role, content} in column `name`; the order of roles is not looked at."""
    messages = []
    for index, raw in enumerate(list_of_turns(value, name)):
        path = f"{name}[{index}]"
        if "role" not in raw and "from" in raw:
            raise RowError("has from and value; set format: sharegpt", path, shorten(raw))
        for key in ("tool_calls", "function_call"):
            if raw.get(key):
                raise RowError("calls a tool, which this version cannot train on; remove the row", f"{path}.{key}")
        message = {
            "role": required_text(raw.get("role"), f"{path}.role"),
            "content": _content(raw.get("content"), f"{path}.content"),
        }
        reasoning = next((raw[key] for key in REASONING_KEYS if raw.get(key)), None)
        if reasoning is not None:
            # Templates read either name.
            message |= dict.fromkeys(REASONING_KEYS, required_text(reasoning, f"{path}.reasoning_content"))
        messages.append(message)
    return messages


def with_system(system: str, messages: list[Message]) -> list[Message]:
    """`messages` after a system message, where there is one."""
    return [{"role": "system", "content": system}, *messages] if system else messages


def in_order(messages: list[Message], name: str, offset: int = 0, last: str = "assistant") -> list[Message]:
    """`messages` when their roles are in order and the `last` one is whose it must be; `offset` counts those that are
    not in the data's list."""
    expected = "user"
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system" and index == 0:
            continue
        if role != expected:
            path = f"{name}[{index - offset}]"
            raise RowError(f"{_why_not(role, expected)}", path, shorten(role))
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != last:
        path = f"{name}[{len(messages) - 1 - offset}]"
        raise RowError(f"is the last message and must be the {last}'s", path, shorten(messages[-1]["role"]))
    return messages


def _why_not(role: str, expected: str) -> str:
    if role in ("tool", "function", "ipython"):
        return "is a tool's message, which this version cannot train on; remove the row"
    if role == "system":
        return "is a system message; only the first message may be one"
    if role not in ("user", "assistant"):
        return "has an unknown role; use system, user or assistant"
    return f"must be the {expected}'s: after an optional system message user and assistant take turns"


def list_of_turns(value: Any, name: str) -> list[dict[str, Any]]:
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
        return required_text(value, path)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError("is not text; only parts of type text can be trained on", f"{path}[{index}]", shorten(part))
        texts.append(required_text(part.get("text"), f"{path}[{index}].text"))
    return required_text("".join(texts), path)


def required_text(value: Any, path: str) -> str:
    if isinstance(value, str) and value.strip():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(
                "holds half of a surrogate pair, which is no character; remove it", path, shorten(value)
            ) from None
        return value
    if value is None:
        raise RowError("is missing; it must be text", path)
    if not isinstance(value, str):
        raise RowError(f"must be text, not {kind_of(value)}", path, shorten(value))
    raise RowError("is empty; it must hold text", path, shorten(value))


def kind_of(value: Any) -> str:
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
