"""Sizes as people read and write them."""

from __future__ import annotations

import re

__all__ = ["parse_size", "size"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(k|M|G|T|ki|Ki|Mi|Gi|Ti)?B?")
_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"ki": 2**10, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def size(num_bytes: int) -> str:
    """999 B, 1.5 MB or 16.1 GB."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def parse_size(text: str) -> int:
    """Bytes of 500MB, 5GB or 40GiB. Raises ValueError with what would be right."""
    found = _SIZE.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is not a size; write it like 500MB, 5GB or 40GiB")
    return int(float(found[1]) * _UNITS.get(found[2], 1))
