"""Folders of safetensors: what is in them, whether they are whole, and writing them shard by shard.

Nothing here builds a model or holds more than one shard in memory, and torch is imported only where tensors are read
or written. Called by `models` (checks), `gguf`, `artifact`, `merge` and `checkpoint.exports`.
The format: 8 bytes length, a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3
from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "INDEX",
    "SHARD_BYTES",
    "BrokenWeightsError",
    "Place",
    "WeightFiles",
    "file_digest",
    "read_tensors",
    "write_tensors",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
"""Largest shard written, as transformers and the Hub have it."""
LONGEST_HEADER = 100_000_000


class BrokenWeightsError(Exception):
    """A weight file is missing or not whole: its path, what was found, and what is wrong with it."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


class Place(NamedTuple):
    """Where the data of a tensor is."""

    shard: str
    dtype: str
    """By safetensors' name."""
    start: int
    """In the file, in bytes."""
    end: int


@dataclass(frozen=True)
class WeightFiles:
    """The shards of one folder, and the shape of each tensor in them."""

    folder: Path
    shards: tuple[str, ...]
    shard_of: dict[str, str]
    """Tensor name -> shard."""
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, Place]

    @classmethod
    def of(cls, folder: Path) -> WeightFiles | None:
        """Read the headers of a folder's safetensors; None when it has none. Raises BrokenWeightsError."""
        shards = _shards(folder)
        return cls._of_shards(folder, shards) if shards else None

    @classmethod
    def of_file(cls, path: Path) -> WeightFiles:
        """One safetensors file, whatever its name. Raises BrokenWeightsError."""
        return cls._of_shards(path.parent, [path.name])

    @classmethod
    def _of_shards(cls, folder: Path, shards: list[str]) -> WeightFiles:
        shard_of: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, Place] = {}
        for shard in shards:
            header, data = _header(folder / shard)
            for name, entry in header.items():
                shard_of[name] = shard
                shapes[name] = tuple(entry["shape"])
                start, end = entry["data_offsets"]
                places[name] = Place(shard, entry["dtype"], data + start, data + end)
        if (folder / INDEX).is_file() and shards == _shards(folder):
            for name, shard in _index(folder).items():
                if shard_of.get(name) != shard:
                    raise BrokenWeightsError(
                        folder / shard,
                        f"the index promises the tensor {name}, which is not in it; copy the whole model",
                    )
        return cls(folder, tuple(shards), shard_of, shapes, places)

    def stored_name(self, name: str) -> str | None:
        """The name that a parameter has in the files: its own, or without the model's first part (transformer.)."""
        without = name.partition(".")[2]
        return name if name in self.shard_of else without if without in self.shard_of else None

    def digest(self) -> str:
        """blake3 over the names and contents of the shards."""
        whole = blake3()
        for shard in self.shards:
            whole.update(f"{shard}\0{file_digest(self.folder / shard)}\n".encode())
        return whole.hexdigest()


def file_digest(path: Path) -> str:
    """blake3 of a file's content, in hexadecimal, on all cores."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def _shards(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        shards = sorted(set(_index(folder).values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise BrokenWeightsError(
                    folder / shard, f"is missing; {INDEX} lists {len(shards)} shards; copy the whole model"
                )
        return shards
    return [SINGLE] if (folder / SINGLE).is_file() else []


def _index(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenWeightsError(
            folder / INDEX, "is not an index: JSON with a weight_map from tensor to shard; copy it again"
        ) from error


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Name -> {dtype, shape, data_offsets}, and where the data begins."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise BrokenWeightsError(
                path, f"is not a safetensors file ({size} bytes, header of {length} bytes); copy it again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((stop for _, stop in (entry["data_offsets"] for entry in header.values())), default=0)
            shapes_given = all(isinstance(entry["shape"], list) for entry in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BrokenWeightsError(
                path, "is not a safetensors file: its header cannot be read; copy it again"
            ) from error
    if not shapes_given:
        raise BrokenWeightsError(path, "is not a safetensors file: its header cannot be read; copy it again")
    if 8 + length + end != size:
        raise BrokenWeightsError(
            path, f"is cut off: {size} bytes where its header promises {8 + length + end}; copy it again"
        )
    return dict(header), 8 + length


def read_tensors(files: WeightFiles, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) one at a time, in the order of the shards, or of `names`."""
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for name in files.shard_of if names is None else names:
            shard = files.shard_of[name]
            if shard not in opened:
                opened[shard] = stack.enter_context(safe_open(files.folder / shard, framework="pt"))
            yield name, opened[shard].get_tensor(name)


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], single: str = SINGLE, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write (name, CPU tensor) pairs as safetensors into `folder`, holding one shard in memory; -> bytes of tensors.

    One shard becomes `single`; more become model-00001-of-00002.safetensors and so on, with an index.
    """
    unnamed: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total = 0

    from safetensors.torch import save_file

    def flush() -> None:
        path = folder / f".shard-{len(unnamed)}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        unnamed.append((path, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.detach().contiguous()
        pending_bytes += size
        total += size
    if pending or not unnamed:
        flush()
    _name_shards(folder, unnamed, single, total)
    return total


def _name_shards(folder: Path, unnamed: list[tuple[Path, list[str]]], single: str, total: int) -> None:
    if len(unnamed) == 1:
        unnamed[0][0].rename(folder / single)
        (folder / single).chmod(0o644)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(unnamed, start=1):
        shard = f"model-{number:05d}-of-{len(unnamed):05d}.safetensors"
        path.rename(folder / shard)
        (folder / shard).chmod(0o644)
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
