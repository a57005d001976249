"""Elements of one type as elements of another, in numpy: no torch is needed to export. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXPORT_TYPES", "OutOfRangeError", "converted"]

EXPORT_TYPES = ("BF16", "F16", "F32")
_LARGEST_F16 = 65504.0


class OutOfRangeError(ValueError):
    """A value that the type cannot hold; the message says which."""


def converted(data: memoryview, dtype: str, to: str) -> memoryview:
    """`data`, elements of type `dtype`, as elements of type `to`, rounded to nearest even as torch does; NaN stays.

    Types that are no floating point stay as they are. Raises OutOfRangeError where float16 would make an infinity of
    a number.
    """
    if dtype == to or dtype not in EXPORT_TYPES:
        return data
    values = _as_f32(data, dtype)
    if to == "F32":
        return values.data.cast("B")
    return (_bf16(values) if to == "BF16" else _f16(values)).data.cast("B")


def _as_f32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float16 if dtype == "F16" else np.float32).astype(np.float32, copy=False)


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    # Half of what is cut off is added, less one where the kept part is even: ties go to even.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def _f16(values: NDArray[np.float32]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    lost = np.isinf(rounded) & np.isfinite(values)
    if lost.any():
        worst = values[lost][np.abs(values[lost]).argmax()]
        raise OutOfRangeError(f"the value {worst:g} is beyond {_LARGEST_F16:g}, the largest of float16; use bfloat16")
    return rounded
