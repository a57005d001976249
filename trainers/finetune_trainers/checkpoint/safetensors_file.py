"""The header of a safetensors file whose data will be written as a stream. Pure; used for shards and for exports.

The format is that of https://github.com/huggingface/safetensors (README, "Format"): 8 bytes with the header's length,
little endian; the header, JSON of {name: {dtype, shape, data_offsets}} and __metadata__, which spaces may follow; the
data of all tensors, end to end and in order, without holes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from finetune_trainers.checkpoint.documents import canonical

__all__ = ["Entry", "safetensors_header"]


class Entry(NamedTuple):
    """One tensor: its type by safetensors' name, and its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def safetensors_header(entries: Sequence[Entry], metadata: Mapping[str, str], alignment: int = 8) -> bytes:
    """All that precedes the data of `entries`, which begins at a multiple of `alignment` bytes."""
    header: dict[str, JsonValue] = {"__metadata__": dict(metadata)}
    upto = 0
    for entry in entries:
        offsets: list[JsonValue] = [upto, upto + entry.size]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        upto += entry.size
    if len(header) != len(entries) + 1:
        raise ValueError("two tensors have one name")
    text = canonical(header)
    text = text.ljust(-(-(len(text) + 8) // alignment) * alignment - 8)
    return len(text).to_bytes(8, "little") + text
