"""From judged answers to the conversations that are tokenized: two for each row of the data, side by side.

A pair becomes its chosen and its rejected conversation. A single answer becomes its own conversation, and its prompt
with the answer of the row before: what KTO measures its distance by. Called by `prepare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from finetune_trainers.data.formats import Row
from finetune_trainers.data.preferences import Preference, Rated
from finetune_trainers.data.turns import Conversation, Item, Message

__all__ = ["side_by_side"]

Key = TypeVar("Key")


def side_by_side(
    chunks: Iterable[tuple[Key, Sequence[Row]]],
) -> Iterator[tuple[tuple[Key, list[float] | None], list[Item]]]:
    """((key, what the data says of each row), conversations or documents), chunk by chunk. Rows that were not judged
    pass as they are, and nothing is said of them."""
    before: Message | None = None
    for key, rows in chunks:
        items: list[Item] = []
        marks: list[float] = []
        rated = [row for row in rows if isinstance(row, Rated)]
        if before is None and rated:
            before = rated[-1].conversation.messages[-1]  # nothing is before the first row
        for row in rows:
            match row:
                case Preference():
                    items += [row.chosen, row.rejected]
                    marks.append(row.margin)
                case Rated():
                    assert before is not None
                    messages = row.conversation.messages
                    items += [row.conversation, Conversation([*messages[:-1], before])]
                    marks.append(float(row.good))
                    before = messages[-1]
                case _:
                    items.append(row)
        yield (key, marks if len(marks) == len(rows) else None), items
