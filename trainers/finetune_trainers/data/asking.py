"""Rows that ask and do not answer: the model writes the answers, and rewards judge them. Called by `formats`.

    {"prompt": "…", "answer": "42", …}         text
    {"prompt": […], "system": "…", …}          messages, the user's last

All other columns are kept for rewards, as they are: whatever tells a good answer from a bad one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from finetune_trainers.data.faults import RowError, shorten
from finetune_trainers.data.turns import Prompt, in_order, kind_of, messages_of, required_text, with_system

if TYPE_CHECKING:
    from finetune_trainers.data.formats import RowFormat

__all__ = ["read_prompt"]


def read_prompt(form: RowFormat, row: dict[str, Any]) -> Prompt:
    """A question with the row's other columns. Raises RowError."""
    name = form.names["prompt"]
    value = row[name]
    if value == []:
        raise RowError("is empty; it must hold at least a user's message", name, "[]")
    if isinstance(value, list):
        asked = messages_of(value, name)
    else:
        asked = [{"role": "user", "content": required_text(value, name)}]
    system = form.optional_text(row, "system")
    if system and asked[0]["role"] == "system":
        raise RowError("stands beside a system message in the conversation; keep one", form.names["system"])
    messages = in_order(with_system(system, asked), name, offset=1 if system else 0, last="user")
    own = {name, form.names["system"]}
    return Prompt(messages, {column: _json(column, value) for column, value in row.items() if column not in own})


def _json(column: str, value: Any) -> Any:
    """`value` as rewards will be given it."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        what = f"holds {kind_of(value)}, and rewards are given every column as JSON; remove the column"
        raise RowError(what, column, shorten(value)) from None
