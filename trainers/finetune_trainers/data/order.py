"""The order in which sequences are trained on: an endless stream that any worker can enter anywhere.

Nothing about the order is stored but a position: where a run stopped is one number, and it means the same at
every world size. Called by `batches`; the launcher asks for `sequences_per_epoch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetune_trainers.prepared import PreparedSource

__all__ = ["TrainOrder", "sequences_per_epoch_of"]


def sequences_per_epoch_of(source: PreparedSource) -> int:
    """How many sequences of `source` one epoch holds: weight × sequences, to the nearest whole."""
    copies, part = divmod(source.weight, 1)
    return int(copies) * source.num_sequences + round(part * source.num_sequences)


class TrainOrder:
    """Position -> sequence. Epoch e of a mixture holds, of each source with weight w, floor(w) copies of all
    its sequences and a part of them for the rest of w; the next epoch's part begins where this one's
    ended."""

    def __init__(self, sources: Sequence[PreparedSource], seed: int) -> None:
        self._num_sequences = [source.num_sequences for source in sources]
        self._taken = [sequences_per_epoch_of(source) for source in sources]
        self._starts = np.concatenate([[0], np.cumsum(self._taken)]).astype(np.int64)
        self._seed = seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._shuffles: dict[int, NDArray[np.int64]] = {}

    @property
    def sequences_per_epoch(self) -> int:
        return int(self._starts[-1])

    def slot(self, position: int) -> tuple[int, int, int]:
        """(epoch, index of the source, index of the sequence in that source) of stream position `position` >=
        0."""
        epoch, within = divmod(position, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._permutation = _permutation(self.sequences_per_epoch, self._seed, epoch, 0)
            self._epoch = epoch
        place = int(self._permutation[within])
        source = int(np.searchsorted(self._starts, place, side="right")) - 1
        return epoch, source, self._sequence(source, place - int(self._starts[source]), epoch)

    def visited(self, stop: int) -> list[tuple[int, int]]:
        """(source, sequence) of all that the positions before `stop` hold, each once, in the order of the first
        visit."""
        num_all = sum(self._num_sequences)
        found: dict[tuple[int, int], None] = {}
        for position in range(stop):
            found[self.slot(position)[1:]] = None
            if len(found) == num_all:
                break
        return list(found)

    def _sequence(self, source: int, index: int, epoch: int) -> int:
        """The sequence behind the `index`-th of those that `epoch` takes from `source`."""
        total, taken = self._num_sequences[source], self._taken[source]
        whole = taken // total * total
        if index < whole:
            return index % total
        # The part walks around one fixed shuffle of the source, so that no sequence comes twice in one part
        # and all come equally often over the epochs.
        if source not in self._shuffles:
            self._shuffles[source] = _permutation(total, self._seed, source, 1)
        return int(self._shuffles[source][(epoch * (taken - whole) + index - whole) % total])


def _permutation(size: int, seed: int, stream: int, purpose: int) -> NDArray[np.int64]:
    """A permutation drawn from (seed, stream, purpose).

    Made by sorting raw Philox output: numpy promises to keep a bit generator's raw stream, not `permutation`,
    the same from version to version (NEP 19), and a resumed run must find its order again.
    """
    generator = np.random.Philox(key=[seed, stream * 2 + purpose])
    return np.argsort(generator.random_raw(size), kind="stable").astype(np.int64)
