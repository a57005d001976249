"""Safetensors of any size, written as a stream: nothing is gathered, no GPU and no torch, memory for a few blocks.

    model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json

A `Weight` is a tensor that can be read from anywhere in it: out of a checkpoint's slices (`of_checkpoint`), or out of
a model's files, or a sum of both (`finetune_trainers.merge`). Blocks are read and rounded by several threads, and
written in order to a disk or a bucket, digests being taken as they pass. Where a checkpoint was taken, by how
many ranks and under which ZeRO stage makes no difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from threading import local

from blake3 import blake3

from finetune_trainers.checkpoint.documents import canonical
from finetune_trainers.checkpoint.exports.precision import EXPORT_TYPES, OutOfRangeError, converted
from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Manifest, SliceKey, TensorRecord
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.safetensors_file import Entry, safetensors_header
from finetune_trainers.checkpoint.slices import Wanted
from finetune_trainers.checkpoint.storage.disk import OsDisk
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError
from finetune_trainers.weights import WeightFiles

__all__ = ["BLOCK_BYTES", "ExportedFile", "Weight", "of_checkpoint", "of_files", "write_weights"]

BLOCK_BYTES = 8 << 20
"""As it is read. A request to a bucket should not be shorter, and memory is a small multiple of it."""
_BLOCKS_AHEAD = 4
_THREADS = 3
_DISK = OsDisk()
_kept = local()


@dataclass(frozen=True)
class ExportedFile:
    """What a file must be to be trusted."""

    bytes: int
    digest: str
    """blake3."""


@dataclass(frozen=True)
class Weight:
    """A tensor to be written."""

    entry: Entry
    numel: int
    block: int
    """Elements to be read at once."""
    read: Callable[[int, int], memoryview]
    """Elements [start, end), in the type of the entry. Called by several threads. Raises OutOfRangeError."""


def _exported_type(stored: str, dtype: str) -> str:
    """The type that a tensor is written in: numbers that are no floating point, such as positions, keep theirs."""
    if dtype not in EXPORT_TYPES:
        raise UserError(f"weights cannot be exported as {dtype}; use one of {', '.join(EXPORT_TYPES)}")
    return dtype if stored in EXPORT_TYPES else stored


def of_checkpoint(
    storage: Storage,
    manifest: Manifest,
    names: Mapping[str, str] | None = None,
    role: str = "model",
    dtype: str = "BF16",
) -> list[Weight]:
    """The tensors of a role as weights.

    `names`: tensor of the checkpoint -> name in the files; those that are not in it are left out; None: all, as they
    are. Reading one raises DamagedError when the checkpoint is damaged.
    """
    reader = SliceReader(storage, manifest, BLOCK_BYTES)
    weights = []
    for tensor in manifest.intent.tensors:
        name = tensor.name if names is None else names.get(tensor.name)
        if tensor.role == role and name is not None:
            weights.append(_of_tensor(reader, tensor, name, dtype))
    if not weights:
        raise UserError(f"checkpoint {manifest.id} holds no tensors of {role!r} to export")
    return weights


def _of_tensor(reader: SliceReader, tensor: TensorRecord, name: str, dtype: str) -> Weight:
    state = "param" if "param" in tensor.states else next(iter(tensor.states))
    stored, key = tensor.states[state], SliceKey(tensor.role, tensor.name, state)
    exported = _exported_type(stored, dtype)

    def read(start: int, end: int) -> memoryview:
        data = _memory((end - start) * ITEM_BYTES[stored], stored != exported)
        reader.read({Wanted(key, start, end): data})
        return _as_type(name, data, stored, exported)

    entry = Entry(name, exported, tensor.shape, tensor.numel * ITEM_BYTES[exported])
    return Weight(entry, tensor.numel, BLOCK_BYTES // ITEM_BYTES[stored], read)


def _memory(size: int, is_converted: bool) -> memoryview:
    """So many bytes to read into. What is converted at once goes where this thread's last block was: new memory would
    cost as much as reading into it."""
    if not is_converted:
        return memoryview(bytearray(size))
    if len(getattr(_kept, "data", b"")) < size:
        _kept.data = memoryview(bytearray(size))
    kept: memoryview = _kept.data
    return kept[:size]


def of_files(files: WeightFiles, dtype: str, names: Iterable[str] | None = None) -> list[Weight]:
    """The tensors of a model's folder as weights, or those with these names, in the order of the files."""
    wanted = files.places.keys() if names is None else set(names)
    return [_of_file(files, name, dtype) for name in files.places if name in wanted]


def _of_file(files: WeightFiles, name: str, dtype: str) -> Weight:
    place, shape = files.places[name], files.shapes[name]
    exported, item, numel = _exported_type(place.dtype, dtype), ITEM_BYTES[place.dtype], prod(shape)
    path = str(files.folder / place.shard)

    def read(start: int, end: int) -> memoryview:
        data = _memory((end - start) * item, place.dtype != exported)
        count = _DISK.read_into(path, place.start + start * item, [data])
        return _as_type(name, data[:count], place.dtype, exported)

    return Weight(Entry(name, exported, shape, numel * ITEM_BYTES[exported]), numel, BLOCK_BYTES // item, read)


def _as_type(name: str, data: memoryview, stored: str, exported: str) -> memoryview:
    """`converted`, with the tensor's name in the refusal."""
    try:
        return converted(data, stored, exported)
    except OutOfRangeError as error:
        raise UserError(f"{name} cannot be exported as {exported}: {error}") from None


def write_weights(
    sink: Storage, weights: Sequence[Weight], stem: str = "model", max_shard_bytes: int = 5_000_000_000
) -> dict[str, ExportedFile]:
    """Write tensors into `sink`, an index beside them when one file does not take them all -> its files by name."""
    files = _files(weights, stem, max_shard_bytes)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="export") as pool:
        written = {file: _write(pool, sink, file, held) for file, held in files.items()}
    if len(files) > 1:
        written[f"{stem}.safetensors.index.json"] = _write_index(sink, stem, files)
    return written


def _files(weights: Sequence[Weight], stem: str, max_shard_bytes: int) -> dict[str, list[Weight]]:
    """Which tensors go into which file, in order; a tensor is never cut."""
    cuts, held = [0], 0
    for index, weight in enumerate(weights):
        if held and held + weight.entry.size > max_shard_bytes:
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


def _write(pool: ThreadPoolExecutor, sink: Storage, file: str, weights: list[Weight]) -> ExportedFile:
    header = safetensors_header([weight.entry for weight in weights], {"format": "pt"})
    size = len(header) + sum(weight.entry.size for weight in weights)
    digest = blake3()

    def parts() -> Iterator[memoryview]:
        digest.reset()
        digest.update(header)
        yield memoryview(header)
        for block in _ahead(pool, weights):
            digest.update(block)
            yield block

    sink.write(file, parts, size)
    return ExportedFile(size, digest.hexdigest())


def _ahead(pool: ThreadPoolExecutor, weights: list[Weight]) -> Iterator[memoryview]:
    """The content in order, the next blocks being made while one is written."""
    blocks = ((weight, start) for weight in weights for start in range(0, weight.numel, weight.block))
    coming: deque[Future[memoryview]] = deque()
    for weight, start in blocks:
        coming.append(pool.submit(weight.read, start, min(start + weight.block, weight.numel)))
        if len(coming) == _BLOCKS_AHEAD:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _write_index(sink: Storage, stem: str, files: Mapping[str, list[Weight]]) -> ExportedFile:
    weight_map = {weight.entry.name: file for file, weights in files.items() for weight in weights}
    total = sum(weight.entry.size for weights in files.values() for weight in weights)
    data = canonical({"metadata": {"total_size": total}, "weight_map": dict(weight_map)})
    sink.create(f"{stem}.safetensors.index.json", data)
    return ExportedFile(len(data), blake3(data).hexdigest())
