"""Memory that was freed, given back to the machine. Called by `method` between the parts of an iteration.

Tensors of up to 32 MB lie in the C library's heaps, which keep what was freed in them: gradients and activations of a
step come to lie beside the room that those of the step before have left, and the process grows by as much again.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

__all__ = ["give_back"]


def give_back() -> None:
    """Of all that this process has freed, what the C library still holds; nothing where it knows no way to do so."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any | None:
    """glibc's; other C libraries have none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
