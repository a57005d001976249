"""The weights of a checkpoint as Hugging Face safetensors, by streaming.

    model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json

Each tensor is read in blocks from the shards that hold its slices, verified, rounded to the type that is asked for and
written on, to a disk or a bucket. Nothing is gathered: no GPU, no torch, and memory for a few blocks whatever
the model's size. Where the checkpoint was taken, by how many ranks and under which ZeRO stage makes no difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from blake3 import blake3

from finetune_trainers.checkpoint.documents import canonical
from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Manifest, SliceKey, TensorRecord
from finetune_trainers.checkpoint.precision import EXPORT_TYPES, OutOfRangeError, converted
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.safetensors_file import Entry, safetensors_header
from finetune_trainers.checkpoint.slices import Wanted
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["ExportedFile", "export_weights"]

SHARD_BYTES = 5_000_000_000
"""Largest file written, as transformers and the Hub have it."""
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class ExportedFile:
    """What a file must be to be trusted."""

    bytes: int
    digest: str
    """blake3."""


@dataclass(frozen=True)
class _Weight:
    entry: Entry
    key: SliceKey
    dtype: str
    numel: int


def export_weights(
    storage: Storage,
    manifest: Manifest,
    sink: Storage,
    names: Mapping[str, str] | None = None,
    role: str = "model",
    state: str = "param",
    dtype: str = "BF16",
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, ExportedFile]:
    """Write the tensors of a role into `sink` -> its files by name.

    `names`: tensor of the checkpoint -> name in the files; those that are not in it are left out; None: all, as they
    are. Raises UserError when a value does not fit `dtype`, DamagedError when the checkpoint is.
    """
    if dtype not in EXPORT_TYPES:
        raise UserError(f"weights cannot be exported as {dtype}; use one of {', '.join(EXPORT_TYPES)}")
    weights = _weights(manifest, names, role, state, dtype)
    files = _files(weights, stem, shard_bytes)
    reader, written = SliceReader(storage, manifest, _BLOCK_BYTES), {}
    for file, held in files.items():
        written[file] = _write(reader, sink, file, held, dtype)
    if len(files) > 1:
        written[f"{stem}.safetensors.index.json"] = _write_index(sink, stem, files)
    return written


def _weights(manifest: Manifest, names: Mapping[str, str] | None, role: str, state: str, dtype: str) -> list[_Weight]:
    weights = []
    for tensor in manifest.intent.tensors:
        name = tensor.name if names is None else names.get(tensor.name)
        if tensor.role == role and name is not None:
            kept = state if state in tensor.states else next(iter(tensor.states))
            weights.append(_weight(tensor, name, kept, dtype))
    if not weights:
        raise UserError(f"checkpoint {manifest.id} holds no tensors of {role!r} to export")
    return weights


def _weight(tensor: TensorRecord, name: str, state: str, dtype: str) -> _Weight:
    """Numbers that are no floating point, such as a buffer of positions, keep their type."""
    stored = tensor.states[state]
    exported = dtype if stored in EXPORT_TYPES else stored
    entry = Entry(name, exported, tensor.shape, tensor.numel * ITEM_BYTES[exported])
    return _Weight(entry, SliceKey(tensor.role, tensor.name, state), stored, tensor.numel)


def _files(weights: Sequence[_Weight], stem: str, shard_bytes: int) -> dict[str, list[_Weight]]:
    """Which tensors go into which file, in order; a tensor is never cut."""
    cuts, held = [0], 0
    for index, weight in enumerate(weights):
        if held and held + weight.entry.size > shard_bytes:
            cuts.append(index)
            held = 0
        held += weight.entry.size
    cuts.append(len(weights))
    count = len(cuts) - 1
    if count == 1:
        return {f"{stem}.safetensors": list(weights)}
    return {
        f"{stem}-{number:05d}-of-{count:05d}.safetensors": list(weights[start:end])
        for number, (start, end) in enumerate(pairwise(cuts), start=1)
    }


def _write(reader: SliceReader, sink: Storage, file: str, weights: list[_Weight], dtype: str) -> ExportedFile:
    header = safetensors_header([weight.entry for weight in weights], {"format": "pt"})
    size = len(header) + sum(weight.entry.size for weight in weights)
    digest = blake3()

    def parts() -> Iterator[memoryview]:
        digest.reset()
        digest.update(header)
        yield memoryview(header)
        for block in _ahead(reader, weights, dtype):
            digest.update(block)
            yield block

    sink.write(file, parts, size)
    return ExportedFile(size, digest.hexdigest())


def _ahead(reader: SliceReader, weights: list[_Weight], dtype: str) -> Iterator[memoryview]:
    """The content, the next block being read while the last one is written."""
    blocks = [(weight, start) for weight in weights for start in range(0, weight.numel, _elements(weight))]
    coming: deque[Future[memoryview]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="export") as pool:
        for weight, start in blocks:
            coming.append(pool.submit(_block, reader, weight, start, dtype))
            if len(coming) == 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _elements(weight: _Weight) -> int:
    return _BLOCK_BYTES // ITEM_BYTES[weight.dtype]


def _block(reader: SliceReader, weight: _Weight, start: int, dtype: str) -> memoryview:
    end = min(start + _elements(weight), weight.numel)
    want = Wanted(weight.key, start, end)
    data = memoryview(bytearray((end - start) * ITEM_BYTES[weight.dtype]))
    reader.read({want: data})
    try:
        return converted(data, weight.dtype, weight.entry.dtype)
    except OutOfRangeError as error:
        raise UserError(f"{weight.entry.name} cannot be exported as {dtype}: {error}") from None


def _write_index(sink: Storage, stem: str, files: Mapping[str, list[_Weight]]) -> ExportedFile:
    weight_map = {weight.entry.name: file for file, weights in files.items() for weight in weights}
    total = sum(weight.entry.size for weights in files.values() for weight in weights)
    data = canonical({"metadata": {"total_size": total}, "weight_map": dict(weight_map)})
    sink.create(f"{stem}.safetensors.index.json", data)
    return ExportedFile(len(data), blake3(data).hexdigest())
