"""What becomes of rows that are longer than a sequence, or that teach nothing. Called by `prepare` on encoded
rows.

A row of the data is one encoded row, or two that stay together: the answers of a pair, or an answer and a mismatched
one. They are kept, cut or dropped as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from finetune_api.spec import DataFormat, MethodSettings, OnlineMethod
from finetune_trainers.data.faults import Faults
from finetune_trainers.data.readers import Chunk
from finetune_trainers.data.tokenize import EncodedRows

__all__ = ["MISMATCHED", "Kept", "Limits", "in_words", "longest_row"]

MISMATCHED = ""
"""The name of an answer to another prompt, which is nobody's fault: it is cut to fit."""
_NAMES: dict[DataFormat, tuple[str | None, ...]] = {
    DataFormat.PREFERENCE: ("chosen", "rejected"),
    DataFormat.UNPAIRED_PREFERENCE: (None, MISMATCHED),
}


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of a chunk. T: tokens, n: encoded rows."""

    ids: NDArray[np.int32]
    """[T]"""
    trained: NDArray[np.bool_]
    """[T]"""
    lengths: NDArray[np.int64]
    """[n]"""
    items: list[int]
    """Which rows of the data stay, by their place in the chunk."""


class _Fate(Enum):
    KEPT = auto()
    TRUNCATED = auto()
    DROPPED = auto()
    FAULTY = auto()


_Piece = tuple[int, int]


def longest_row(settings: MethodSettings) -> int:
    """Tokens that a row may have: a question must leave room for its answer."""
    if isinstance(settings, OnlineMethod):
        return settings.max_seq_length - settings.sampling.max_new_tokens
    return settings.max_seq_length


def in_words(settings: MethodSettings) -> str:
    """The same for a person, by the settings that make it."""
    if isinstance(settings, OnlineMethod):
        return f"maxSeqLength {settings.max_seq_length} - sampling.maxNewTokens {settings.sampling.max_new_tokens}"
    return f"maxSeqLength {settings.max_seq_length}"


class Limits:
    """What becomes of rows that are too long or teach nothing."""

    def __init__(self, settings: MethodSettings, form: DataFormat, faults: Faults) -> None:
        self._limit = longest_row(settings)
        self._policy = settings.long_rows
        asked = isinstance(settings, OnlineMethod)
        mend = (
            "raise maxSeqLength, or set longRows to drop" if asked else "raise it, or set longRows to truncate or drop"
        )
        self._too_long = f"is longer than {in_words(settings)}; {mend}"
        self._is_text = form is DataFormat.TEXT
        self._is_prompt = form is DataFormat.PROMPT
        self._names = _NAMES.get(form, (None,))
        self._faults = faults
        self.num_kept = 0
        self.num_dropped = 0
        self.num_truncated = 0

    @property
    def rows_each(self) -> int:
        """Encoded rows that a row of the data consists of."""
        return len(self._names)

    def apply(self, chunk: Chunk, indices: list[int], rows: EncodedRows) -> Kept:
        """The rows that stay, cut where they must be. `indices` [n / rows_each]: the chunk's rows that they are of."""
        ends = np.cumsum(rows.lengths)
        upto = np.concatenate([[0], np.cumsum(rows.trained)])
        num_trained = upto[ends] - upto[ends - rows.lengths]
        sound = (rows.lengths <= self._limit) & ((rows.lengths if self._is_prompt else num_trained) > 0)
        if sound.all():
            self.num_kept += len(indices)
            return Kept(rows.ids, rows.trained, rows.lengths, list(range(len(indices))))
        bounds = list(zip((ends - rows.lengths).tolist(), ends.tolist(), strict=True))
        pieces: list[_Piece] = []
        items: list[int] = []
        for item, index in enumerate(indices):
            first = item * self.rows_each
            own = range(first, first + self.rows_each)
            if all(sound[row] for row in own):
                kept = [bounds[row] for row in own]
            else:
                kept = self._treat(chunk.place(index), rows, {row: bounds[row] for row in own})
            if kept:
                self.num_kept += 1
                items.append(item)
                pieces += kept
        if not pieces:
            return Kept(rows.ids[:0], rows.trained[:0], rows.lengths[:0], [])
        trained = rows.trained.copy()
        trained[[start for start, _ in pieces]] = False
        return Kept(
            np.concatenate([rows.ids[start:end] for start, end in pieces]),
            np.concatenate([trained[start:end] for start, end in pieces]),
            np.array([end - start for start, end in pieces], dtype=np.int64),
            items,
        )

    def _treat(self, place: str, rows: EncodedRows, bounds: dict[int, _Piece]) -> list[_Piece]:
        """The pieces of one row of the data that are kept: of all its encoded rows, or none."""
        fates: set[_Fate] = set()
        pieces: list[_Piece] = []
        for (row, (start, end)), name in zip(bounds.items(), self._names, strict=True):
            if name == MISMATCHED and _Fate.FAULTY in fates:
                break  # the same prompt: the same fault
            fate, kept = self._treat_one(place, rows, row, start, end, name)
            fates.add(fate)
            pieces += kept
        if _Fate.FAULTY in fates:
            return []
        if _Fate.DROPPED in fates:
            self.num_dropped += 1
            return []
        self.num_truncated += _Fate.TRUNCATED in fates
        return pieces

    def _treat_one(
        self, place: str, rows: EncodedRows, row: int, start: int, end: int, name: str | None
    ) -> tuple[_Fate, list[_Piece]]:
        """What becomes of one encoded row, and its pieces that are kept."""
        length = end - start
        if row in rows.faults:
            self._faults.add_row(place, rows.faults[row])
            return _Fate.FAULTY, []
        if name == MISMATCHED:
            return _Fate.KEPT, [(start, min(end, start + self._limit))]
        if self._is_prompt and not length:
            self._faults.add(
                "becomes no tokens, so there is nothing to answer; choose another chatTemplate", file=place
            )
            return _Fate.FAULTY, []
        if not self._is_prompt and not rows.trained[start:end].any():
            what = "has no token that could be trained on: the answer becomes none; choose another chatTemplate"
            self._faults.add(what, file=place, path=name)
            return _Fate.FAULTY, []
        if length <= self._limit:
            return _Fate.KEPT, [(start, end)]
        if self._is_text:
            # A last piece of one token would have nothing to predict.
            cuts = range(start, end, self._limit)
            return _Fate.KEPT, [
                (cut, min(cut + self._limit, end)) for cut in cuts if min(cut + self._limit, end) - cut > 1
            ]
        if self._policy == "error":
            self._faults.add(self._too_long, file=place, path=name, value=f"{length} tokens")
            return _Fate.FAULTY, []
        if self._policy == "truncate" and rows.trained[start : start + self._limit].any():
            return _Fate.TRUNCATED, [(start, start + self._limit)]
        return _Fate.DROPPED, []
