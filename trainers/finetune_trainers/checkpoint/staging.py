"""Memory that a trainer shares with its writer: a copy of what a checkpoint needs, made while training stands still.

A buffer is a file without a name: it is gone when the last process that has it open is gone, however that ends, and
so nothing can be left behind. On Linux it is a memfd, which counts as the container's memory and not against the size
of its /dev/shm. A buffer grows and is used again, because the first touch of memory costs more than the copy.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["ALIGNMENT", "Buffer", "Placed", "laid_out"]

ALIGNMENT = 64
"""Bytes: where a piece may begin."""


class Placed(NamedTuple):
    """Where the pieces of a staged set lie."""

    offsets: tuple[int, ...]
    size: int
    """Of all of them, with the gaps."""


def laid_out(sizes: Sequence[int], begin: int = 0) -> Placed:
    """Pieces of so many bytes, one after the other from `begin` on, each at a multiple of `ALIGNMENT`."""
    offsets, upto = [], begin
    for size in sizes:
        upto = -(-upto // ALIGNMENT) * ALIGNMENT
        offsets.append(upto)
        upto += size
    return Placed(tuple(offsets), upto)


class Buffer:
    """One staging buffer, on the trainer's side."""

    def __init__(self) -> None:
        self.file = _nameless_file()
        """Its descriptor, which the writer inherits."""
        self._map: mmap.mmap | None = None

    def reserve(self, size: int) -> None:
        """Have room for `size` bytes. Views of before must be gone. Raises OSError when there is no memory for it."""
        if self._map is not None and len(self._map) >= size:
            return
        if self._map is not None:
            self._map.close()
            self._map = None
        os.ftruncate(self.file, max(size, os.fstat(self.file).st_size))
        self._map = mmap.mmap(self.file, max(size, 1))

    def view(self, start: int, end: int) -> memoryview:
        """Bytes [start, end), to be written. Whoever asks lets go of it before the next `reserve`."""
        assert self._map is not None, "reserve comes first"
        return memoryview(self._map)[start:end]

    def close(self) -> None:
        """The writer may have it open still."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("finetune-staging", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # deleted as soon as it is open
        return os.dup(file.fileno())
