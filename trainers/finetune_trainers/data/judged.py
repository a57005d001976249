"""From rows to the items that are tokenized, and what is kept of each row beside its tokens. Called by `prepare`.

Judged answers become two conversations for each row of the data, side by side: a pair its chosen and its rejected one;
a single answer its own, and its prompt with the answer of the row before, by which KTO measures its distance. Of a
question its messages and its other columns are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from finetune_trainers.data.formats import Row
from finetune_trainers.data.preferences import Preference, Rated
from finetune_trainers.data.turns import Conversation, Item, Message, Prompt

__all__ = ["Said", "side_by_side"]

Said: TypeAlias = float | Prompt
"""What the data says of a row: by how much an answer is better, whether it is good; or what is asked."""

Key = TypeVar("Key")


def side_by_side(
    chunks: Iterable[tuple[Key, Sequence[Row]]],
) -> Iterator[tuple[tuple[Key, list[Said] | None], list[Item]]]:
    """((key, what the data says of each row), what is tokenized), chunk by chunk. Conversations and documents pass as
    they are, and nothing is said of them."""
    before: Message | None = None
    for key, rows in chunks:
        items: list[Item] = []
        said: list[Said] = []
        rated = [row for row in rows if isinstance(row, Rated)]
        if before is None and rated:
            before = rated[-1].conversation.messages[-1]  # nothing is before the first row
        for row in rows:
            match row:
                case Preference():
                    items += [row.chosen, row.rejected]
                    said.append(row.margin)
                case Rated():
                    assert before is not None
                    messages = row.conversation.messages
                    items += [row.conversation, Conversation([*messages[:-1], before])]
                    said.append(float(row.good))
                    before = messages[-1]
                case Prompt():
                    items.append(row)
                    said.append(row)
                case _:
                    items.append(row)
        yield (key, said if len(said) == len(rows) else None), items
