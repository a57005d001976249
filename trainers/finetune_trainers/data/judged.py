"""From rows to the items that are tokenized, and what is kept of each row beside its tokens. Called by `prepare`.

Judged answers become two conversations for each row of the data, side by side: a pair its chosen and its rejected one;
a single answer its own, and its prompt with an answer to another prompt, by which KTO measures its distance. Of a
question its messages and its other columns are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeAlias, TypeVar

from finetune_trainers.data.faults import RowError
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
    they are, and nothing is said of them. Raises RowError, at once, where single answers are all to one prompt."""
    chunks = iter(chunks)
    begun, ahead = _to_the_second_prompt(chunks)
    return _items(chain(begun, chunks), None if ahead is None else _OtherAnswers(ahead))


def _items(
    chunks: Iterable[tuple[Key, Sequence[Row]]], others: _OtherAnswers | None
) -> Iterator[tuple[tuple[Key, list[Said] | None], list[Item]]]:
    for key, rows in chunks:
        items: list[Item] = []
        said: list[Said] = []
        for row in rows:
            match row:
                case Preference():
                    items += [row.chosen, row.rejected]
                    said.append(row.margin)
                case Rated():
                    assert others is not None, "there is a second prompt"
                    items += [row.conversation, Conversation([*_prompt(row), others.beside(row)])]
                    said.append(float(row.good))
                case Prompt():
                    items.append(row)
                    said.append(row)
                case _:
                    items.append(row)
        yield (key, said if len(said) == len(rows) else None), items


class _OtherAnswers:
    """To each row in turn, the answer of the nearest row before it that has another prompt.

    Rows of one prompt often stand together, and with the answer of any of them a row would be matched.
    """

    def __init__(self, ahead: Rated) -> None:
        """`ahead`: the first row whose prompt is not the first row's. Before the first row there is no other."""
        self._before = ahead
        self._other = _answer(ahead)

    def beside(self, row: Rated) -> Message:
        if _prompt(self._before) != _prompt(row):
            self._other = _answer(self._before)
        self._before = row
        return self._other


def _to_the_second_prompt(
    chunks: Iterator[tuple[Key, Sequence[Row]]],
) -> tuple[list[tuple[Key, Sequence[Row]]], Rated | None]:
    """The chunks as far as a second prompt is answered, and the row in which it is; as far as the first row where rows
    are no single answers. Raises RowError."""
    begun: list[tuple[Key, Sequence[Row]]] = []
    first: Rated | None = None
    for key, rows in chunks:
        begun.append((key, rows))
        for row in rows:
            if not isinstance(row, Rated):
                return begun, None
            first = first or row
            if _prompt(row) != _prompt(first):
                return begun, row
    if first is not None:
        raise RowError(
            "answers one prompt only, and how far the policy has moved is measured by answers to other prompts; add"
            " rows with another prompt, or learn from pairs by dpo"
        )
    return begun, None


def _prompt(row: Rated) -> list[Message]:
    return row.conversation.messages[:-1]


def _answer(row: Rated) -> Message:
    return row.conversation.messages[-1]
