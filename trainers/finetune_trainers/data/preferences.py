"""Rows in which answers were judged: a better and a worse one, or one that was liked or not. Called by `formats`.

    {"prompt": "…", "chosen": "…", "rejected": "…", "margin": 1.5}         texts
    {"prompt": […], "chosen": […], "rejected": […]}                        the prompt's messages, and one more each
    {"chosen": […], "rejected": […]}                                       whole conversations
    {"prompt": "…" or […], "completion": "…" or […], "label": true}

Both answers of a pair follow the same conversation, and only the last message, the assistant's, is learned from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_trainers.data.faults import RowError, shorten
from finetune_trainers.data.turns import (
    Conversation,
    Message,
    in_order,
    kind_of,
    messages_of,
    required_text,
    with_system,
)

if TYPE_CHECKING:
    from finetune_trainers.data.formats import RowFormat

__all__ = ["Preference", "Rated", "read_preference", "read_rated"]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one conversation."""

    chosen: Conversation
    rejected: Conversation
    margin: float
    """By how much the chosen one is better; 0 where the data does not say."""


@dataclass(frozen=True, slots=True)
class Rated:
    """One answer to a conversation."""

    conversation: Conversation
    good: bool


def read_preference(form: RowFormat, row: dict[str, Any]) -> Preference:
    """A pair. Raises RowError."""
    better, worse = form.names["chosen"], form.names["rejected"]
    if isinstance(row[better], list) != isinstance(row[worse], list):
        what = f"must be of the same kind as {better}: text or messages, and it is {kind_of(row[worse])}"
        raise RowError(what, worse, shorten(row[worse]))
    chosen, rejected = _conversation(form, row, "chosen"), _conversation(form, row, "rejected")
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise RowError(f"and {better} must be the same conversation up to the last message", worse)
    if chosen.messages[-1] == rejected.messages[-1]:
        raise RowError(
            f"is the same as {better}, so there is nothing to prefer; remove the row", worse, shorten(row[worse])
        )
    return Preference(chosen, rejected, _margin(form, row))


def read_rated(form: RowFormat, row: dict[str, Any]) -> Rated:
    """One answer with its label. Raises RowError."""
    name = form.names["label"]
    label = row[name]
    if isinstance(label, int | float) and label in (0, 1):
        label = bool(label)
    if not isinstance(label, bool):
        what = "is missing; it" if label is None else "is not a judgement; it"
        raise RowError(f"{what} must be true for a good answer or false for a bad one", name, shorten(label))
    return Rated(_conversation(form, row, "completion"), label)


def _conversation(form: RowFormat, row: dict[str, Any], column: str) -> Conversation:
    """The prompt with the answer in `column`."""
    name = form.names[column]
    if isinstance(row[name], list):
        answer = messages_of(row[name], name)
    else:
        answer = [{"role": "assistant", "content": required_text(row[name], name)}]
    prompt = _prompt(form, row, name)
    if answer[0]["role"] != "assistant":  # the whole conversation is here
        _must_begin_with(answer, prompt, form.names["prompt"], name)
        whole = with_system(_system(form, row, answer), answer)
        return Conversation(in_order(whole, name, len(whole) - len(answer)))
    if not prompt:
        what = "begins with the assistant's message, and there is no prompt before it"
        raise RowError(f"{what}; add a column {form.names['prompt']!r}, or name yours under columns", name)
    if len(answer) > 1:
        raise RowError("must hold the answer alone: one message of the assistant's", name, f"{len(answer)} messages")
    if prompt[-1]["role"] != "user":
        what = "must end with the user's message, which is answered"
        raise RowError(what, form.names["prompt"], shorten(prompt[-1]["role"]))
    messages = with_system(_system(form, row, prompt), [*prompt, *answer])
    return Conversation(in_order(messages, form.names["prompt"], len(messages) - len(prompt) - len(answer)))


def _prompt(form: RowFormat, row: dict[str, Any], answer: str) -> list[Message]:
    """The messages before the answer, without a system column's; empty where the answer's column holds them."""
    name = form.names["prompt"]
    if row.get(name) is None:
        return []
    if isinstance(row[name], list):
        return messages_of(row[name], name)
    return [{"role": "user", "content": required_text(row[name], name)}]


def _must_begin_with(conversation: list[Message], prompt: list[Message], prompt_name: str, name: str) -> None:
    """A prompt beside a whole conversation says the same thing twice; it must be the same thing."""
    said = [message for message in conversation[:-1] if message["role"] != "system"]
    asked = [message for message in prompt if message["role"] != "system"]
    if asked and asked != said[: len(asked)]:
        raise RowError(f"does not begin with {prompt_name}; remove one of them from the row", name)


def _system(form: RowFormat, row: dict[str, Any], messages: list[Message]) -> str:
    system = form.optional_text(row, "system")
    if system and messages[0]["role"] == "system":
        raise RowError("stands beside a system message in the conversation; keep one", form.names["system"])
    return system


def _margin(form: RowFormat, row: dict[str, Any]) -> float:
    name = form.names["margin"]
    value = row.get(name)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RowError("must be a number of at least 0", name, shorten(value))
    return float(value)
