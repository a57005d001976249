"""Documents that were read before are not read again.

A pass over a job looks at the job, its RayJobs, its pods and its report, of which one has changed, or none. Stores
replace a document when it changes and never write into it: the very same object reads the same. Called by `observe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Remembered"]

T = TypeVar("T")


class Remembered(Generic[T]):
    """`read`, which is pure, with a memory of one version of each of the last `size` objects it was given."""

    def __init__(self, read: Callable[[Any], T], size: int) -> None:
        self._read = read
        self._size = size
        self._kept: dict[str, tuple[Any, T]] = {}

    def __call__(self, document: Any) -> T:
        """What `document` reads as. One without a uid is read each time."""
        metadata = document.get("metadata") if isinstance(document, dict) else None
        uid = metadata.get("uid") if isinstance(metadata, dict) else None
        if not isinstance(uid, str):
            return self._read(document)
        kept = self._kept.pop(uid, None)
        if kept is None or kept[0] is not document:
            kept = (document, self._read(document))
        self._kept[uid] = kept
        if len(self._kept) > self._size:
            del self._kept[next(iter(self._kept))]
        return kept[1]
