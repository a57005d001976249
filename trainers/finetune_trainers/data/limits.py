"""What becomes of rows that are longer than a sequence, or that teach nothing. Called by `prepare` on encoded
rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finetune_api.spec import DataFormat, Sft
from finetune_trainers.data.faults import Faults
from finetune_trainers.data.readers import Chunk
from finetune_trainers.data.tokenize import EncodedRows

__all__ = ["Limits"]


class Limits:
    """What becomes of rows that are too long or teach nothing."""

    def __init__(self, sft: Sft, form: DataFormat, faults: Faults) -> None:
        self._limit = sft.max_seq_length
        self._policy = sft.long_rows
        self._is_text = form is DataFormat.TEXT
        self._faults = faults
        self.num_kept = 0
        self.num_dropped = 0
        self.num_truncated = 0

    def apply(
        self, chunk: Chunk, indices: list[int], rows: EncodedRows
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
        """(ids, trained, lengths) of the rows that stay, cut where they must be."""
        ends = np.cumsum(rows.lengths)
        upto = np.concatenate([[0], np.cumsum(rows.trained)])
        num_trained = upto[ends] - upto[ends - rows.lengths]
        sound = (rows.lengths <= self._limit) & (num_trained > 0)
        if sound.all():
            self.num_kept += len(rows.lengths)
            return rows.ids, rows.trained, rows.lengths
        pieces: list[tuple[int, int]] = []
        for index, (end, length) in enumerate(zip(ends.tolist(), rows.lengths.tolist(), strict=True)):
            if sound[index]:
                kept = [(end - length, end)]
            else:
                kept = self._treat(chunk.place(indices[index]), rows, index, end - length, end)
            self.num_kept += bool(kept)
            pieces += kept
        if not pieces:
            return rows.ids[:0], rows.trained[:0], rows.lengths[:0]
        trained = rows.trained.copy()
        trained[[start for start, _ in pieces]] = False
        return (
            np.concatenate([rows.ids[start:end] for start, end in pieces]),
            np.concatenate([trained[start:end] for start, end in pieces]),
            np.array([end - start for start, end in pieces], dtype=np.int64),
        )

    def _treat(self, place: str, rows: EncodedRows, index: int, start: int, end: int) -> list[tuple[int, int]]:
        """The pieces of one unsound row that are kept."""
        length = end - start
        if index in rows.faults:
            self._faults.add_row(place, rows.faults[index])
            return []
        if length <= self._limit:
            self._faults.add("has no token that could be trained on; the answer becomes no tokens", file=place)
            return []
        if self._is_text:
            # A last piece of one token would have nothing to predict.
            cuts = range(start, end, self._limit)
            return [(cut, min(cut + self._limit, end)) for cut in cuts if min(cut + self._limit, end) - cut > 1]
        if self._policy == "error":
            message = f"is longer than maxSeqLength {self._limit}; raise it, or set longRows to truncate or drop"
            self._faults.add(message, file=place, value=f"{length} tokens")
            return []
        if self._policy == "truncate" and rows.trained[start : start + self._limit].any():
            self.num_truncated += 1
            return [(start, start + self._limit)]
        self.num_dropped += 1
        return []
