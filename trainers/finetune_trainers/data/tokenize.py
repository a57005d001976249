"""From conversations, documents and questions to token ids and the mask of trained tokens. Called by `prepare`.

The Rust tokenizer encodes a chunk of rows on all cores with Python's lock released; meanwhile this thread
renders the next chunk. Token offsets stay on the Rust side: only the few characters where a trained part
begins or ends are looked up, because turning all offsets into Python objects costs as much as encoding does.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from finetune_trainers.data.faults import RowError
from finetune_trainers.data.template import Rendered, Renderer
from finetune_trainers.data.turns import Conversation, Document, Item, Prompt

__all__ = ["EncodedRows", "RowTokenizer"]

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Rows end to end. T: tokens in all, n: rows."""

    ids: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T]; whether the model must learn to produce the token. Never the first of a row: nothing predicts
    it."""
    lengths: NDArray[np.int64]
    """[n]; 0 where the row has a fault."""
    faults: dict[int, RowError]
    """By index of the row."""


class RowTokenizer:
    """Encodes rows of one source."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        renderer: Renderer | None,
        *,
        eos_id: int,
        stop_ids: frozenset[int],
        loss_on: Literal["assistant", "all", "last"],
    ) -> None:
        """`renderer` may be None when all rows are documents. `stop_ids`: tokens that end a turn. `loss_on`: every
        answer of a conversation, all of it, or its last answer."""
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._eos_id = eos_id
        self._stop_ids = stop_ids
        self._loss_on = loss_on
        self.num_stops_added = 0
        """Conversations that the template left without a stop token, and that got the end-of-sequence
        token."""

    def encode_all(self, batches: Iterable[tuple[Key, list[Item]]]) -> Iterator[tuple[Key, EncodedRows]]:
        """Encode batch after batch, in order. Each batch holds items of one kind only."""
        # Off when a process has forked; then one core would do all the work.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        pending: deque[tuple[Key, list[Item], list[Rendered | RowError], Future[list[Encoding]]]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as encoder:
            for key, items in batches:
                rendered = self._render(items)
                pending.append((key, items, rendered, encoder.submit(self._encode, items, rendered)))
                if len(pending) > 1:
                    yield self._collect(*pending.popleft())
            while pending:
                yield self._collect(*pending.popleft())

    def _render(self, items: list[Item]) -> list[Rendered | RowError]:
        rendered: list[Rendered | RowError] = []
        for item in items:
            if isinstance(item, Document):
                rendered.append(Rendered(item.text, []))
                continue
            assert self._renderer is not None, "documents need no renderer, conversations do"
            try:
                if isinstance(item, Prompt):
                    rendered.append(Rendered(self._renderer.prompt(item.messages), []))
                else:
                    rendered.append(self._renderer.render(item.messages))
            except RowError as fault:
                rendered.append(fault)
        return rendered

    def _encode(self, items: list[Item], rendered: list[Rendered | RowError]) -> list[Encoding]:
        texts = ["" if isinstance(row, RowError) else row.text for row in rendered]
        documents = not items or isinstance(items[0], Document)
        add_special = documents or (self._renderer is not None and self._renderer.adds_special_tokens)
        # Not encode_batch_fast: it leaves out offsets, but took longer in every measurement (tokenizers 0.23).
        return list(self._tokenizer.encode_batch(texts, add_special_tokens=add_special))

    def _collect(
        self, key: Key, items: list[Item], rendered: list[Rendered | RowError], future: Future[list[Encoding]]
    ) -> tuple[Key, EncodedRows]:
        encodings = future.result()
        ids = [
            [] if isinstance(row, RowError) else self._ids(item, encoding)
            for item, row, encoding in zip(items, rendered, encodings, strict=True)
        ]
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(lengths.sum()))
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if self._loss_on == "all":
            trained = np.ones(len(flat), dtype=np.bool_)
        else:
            trained = np.zeros(len(flat), dtype=np.bool_)
            for item, row, encoding, start, end in zip(
                items, rendered, encodings, starts.tolist(), ends.tolist(), strict=True
            ):
                if isinstance(item, Document):
                    trained[start:end] = True
                elif isinstance(row, Rendered) and row.spans:
                    spans = row.spans[-1:] if self._loss_on == "last" else row.spans
                    for first, last in _token_spans(encoding, spans, end - start):
                        trained[start + first : start + last] = True
        trained[starts[lengths > 0]] = False
        faults = {index: row for index, row in enumerate(rendered) if isinstance(row, RowError)}
        return key, EncodedRows(flat, trained, lengths, faults)

    def _ids(self, item: Item, encoding: Encoding) -> list[int]:
        """The row's token ids, closed by a stop token; a question is left open."""
        ids: list[int] = encoding.ids
        if isinstance(item, Prompt):
            return ids
        if isinstance(item, Conversation):
            if not ids or ids[-1] not in self._stop_ids:
                ids.append(self._eos_id)
                self.num_stops_added += 1
        elif not item.continues and (not ids or ids[-1] != self._eos_id):
            ids.append(self._eos_id)
        return ids


def _token_spans(encoding: Encoding, spans: list[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """Character spans as token spans [first, last). A token that a span shares with the text before it is
    taken in.

    The text ends where the last span does, so that span has all tokens up to `length`, an added stop token
    included.
    """
    for index, (start, end) in enumerate(spans):
        # Characters without a token are whitespace that the tokenizer keeps out of its offsets.
        tokens = (encoding.char_to_token(position) for position in range(start, end))
        first = next((token for token in tokens if token is not None), None)
        if first is None:
            if index == len(spans) - 1:
                yield length - 1, length  # nothing but the stop token
            continue
        if index == len(spans) - 1:
            yield first, length
            continue
        tokens = (encoding.char_to_token(position) for position in range(end - 1, start - 1, -1))
        last = next(token for token in tokens if token is not None) + 1
        # One character may be several tokens, and the look-up names the first.
        while last < length and (chars := encoding.token_to_chars(last)) is not None and chars[0] < end:
            last += 1
        yield first, last
