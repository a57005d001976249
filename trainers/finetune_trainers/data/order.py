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
        self._starts = np.cumsum([0, *self._num_sequences], dtype=np.int64)
        """The number of each source's first sequence, where those of all sources are numbered through."""
        self._seed = seed
        self._epoch = -1
        self._numbers: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Of the sequences of `_epoch`, in its order."""
        self._shuffles: dict[int, NDArray[np.int64]] = {}

    @property
    def sequences_per_epoch(self) -> int:
        return sum(self._taken)

    def slot(self, position: int) -> tuple[int, int, int]:
        """(epoch, index of the source, index of the sequence in that source) of stream position `position` >=
        0."""
        epoch, within = divmod(position, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._numbers, self._epoch = self._numbers_of(epoch), epoch
        number = int(self._numbers[within])
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return epoch, source, number - int(self._starts[source])

    def visited(self, stop: int) -> list[tuple[int, int]]:
        """(source, sequence) of all that the positions before `stop` hold, each once, in the order of the first
        visit."""
        seen = np.zeros(self._starts[-1], dtype=np.bool_)
        found = [np.empty(0, dtype=np.int64)]
        for epoch, start in enumerate(range(0, stop, self.sequences_per_epoch)):
            numbers = self._numbers_of(epoch)[: stop - start]
            first = np.sort(np.unique(numbers, return_index=True)[1])
            new = numbers[first][~seen[numbers[first]]]
            seen[new] = True
            found.append(new)
            if seen.all():
                break
        numbers = np.concatenate(found)
        sources = np.searchsorted(self._starts, numbers, side="right") - 1
        return list(zip(sources.tolist(), (numbers - self._starts[sources]).tolist(), strict=True))

    def _numbers_of(self, epoch: int) -> NDArray[np.int64]:
        """The sequences of `epoch` in its order."""
        chosen = [self._starts[source] + self._taken_from(source, epoch) for source in range(len(self._taken))]
        return np.concatenate(chosen)[_permutation(self.sequences_per_epoch, self._seed, epoch, 0)]

    def _taken_from(self, source: int, epoch: int) -> NDArray[np.int64]:
        """The sequences that `epoch` takes from `source`."""
        total, taken = self._num_sequences[source], self._taken[source]
        copies, num_more = divmod(taken, max(total, 1))
        whole = np.tile(np.arange(total, dtype=np.int64), copies)
        if not num_more:
            return whole
        # The part walks around one fixed shuffle of the source, so that no sequence comes twice in one part
        # and all come equally often over the epochs.
        if source not in self._shuffles:
            self._shuffles[source] = _permutation(total, self._seed, source, 1)
        places = (epoch * num_more + np.arange(num_more, dtype=np.int64)) % total
        return np.concatenate([whole, self._shuffles[source][places]])


def _permutation(size: int, seed: int, stream: int, purpose: int) -> NDArray[np.int64]:
    """A permutation drawn from (seed, stream, purpose).

    Made by sorting raw Philox output: numpy promises to keep a bit generator's raw stream, not `permutation`,
    the same from version to version (NEP 19), and a resumed run must find its order again.
    """
    generator = np.random.Philox(key=[seed, stream * 2 + purpose])
    return np.argsort(generator.random_raw(size), kind="stable").astype(np.int64)
