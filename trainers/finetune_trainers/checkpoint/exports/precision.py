"""Elements of one type as elements of another, in numpy: no torch is needed to export. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXPORT_TYPES", "OutOfRangeError", "as_f32", "converted", "from_f32"]

EXPORT_TYPES = ("BF16", "F16", "F32")
_LARGEST_F16 = 65504.0
_AT_ONCE = 1 << 17
"""Elements; what is computed on the way stays in the processor's cache."""


class OutOfRangeError(ValueError):
    """A value that the type cannot hold; the message says which."""


def converted(data: memoryview, dtype: str, to: str) -> memoryview:
    """`data`, elements of type `dtype`, as elements of type `to`, rounded to nearest even as torch does; NaN stays.

    Types that are no floating point stay as they are. Raises OutOfRangeError where float16 would make an infinity of
    a number.
    """
    if dtype == to or dtype not in EXPORT_TYPES:
        return data
    return from_f32(as_f32(data, dtype), to)


def as_f32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """Elements of a floating-point type, exactly."""
    if dtype == "BF16":
        bits = np.frombuffer(data, np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.frombuffer(data, np.float16 if dtype == "F16" else np.float32).astype(np.float32, copy=False)


def from_f32(values: NDArray[np.float32], to: str) -> memoryview:
    """Elements rounded once. Raises OutOfRangeError."""
    if to == "F32":
        return values.data.cast("B")
    return (_bf16(values) if to == "BF16" else _f16(values)).data.cast("B")


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    rounded = np.empty(len(values), np.uint16)
    sums = np.empty(min(_AT_ONCE, len(values)), np.uint32)
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        bits, count = part.view(np.uint32), len(part)
        # Half of what is cut off is added, less one where the kept part is even: ties go to even.
        kept = np.right_shift(bits, 16, out=sums[:count])
        kept &= 1
        kept += 0x7FFF
        kept += bits
        kept >>= 16  # and a cast: numpy copies every other half much slower
        rounded[start : start + count] = kept
        if np.isnan(part.max()):  # numpy's maximum of numbers with a NaN among them is NaN
            rounded[start : start + count][np.isnan(part)] = 0x7FC0
    return rounded


def _f16(values: NDArray[np.float32]) -> NDArray[Any]:
    rounded = np.empty(len(values), np.float16)
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        with np.errstate(over="ignore"):
            rounded[start : start + len(part)] = part
        _demand_no_overflow(part, rounded[start : start + len(part)])
    return rounded


def _demand_no_overflow(values: NDArray[np.float32], rounded: NDArray[Any]) -> None:
    infinite = (rounded.view(np.uint16) & 0x7FFF) == 0x7C00
    if not infinite.any():
        return
    lost = values[infinite & np.isfinite(values)]
    if len(lost):
        worst = lost[np.abs(lost).argmax()]
        raise OutOfRangeError(f"the value {worst:g} is beyond {_LARGEST_F16:g}, the largest of float16; use bfloat16")
