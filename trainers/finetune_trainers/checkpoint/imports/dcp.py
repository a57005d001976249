"""Reads torch.distributed.checkpoint: any number of ranks' files, or the Hugging Face safetensors that it writes too.

    [<wrapper>]<name>                               weights
    [<any>.]state.<name>.{exp_avg,exp_avg_sq,step}  AdamW's, where they are

The data is read by torch's own readers, tensor by tensor, `weights_only`. A folder of .distcp files lists its pieces in
a pickle, `.metadata`, which torch's reader would execute: here it is read by an unpickler that knows the classes of
such a list and no others.
"""

from __future__ import annotations

import io
import pickle
import re
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from finetune_trainers.checkpoint.imports import ImportOptions
from finetune_trainers.checkpoint.imports.storing import Foreign, demand_pickles_allowed, store, wrapper_of
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["read"]

_METADATA = ".metadata"
_STATE = re.compile(r"(?:.*?\.)??state\.(?P<name>.+)\.(?P<state>exp_avg|exp_avg_sq|step)")
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


def read(source: Path, storage: Storage, options: ImportOptions, now: datetime) -> Manifest:
    """Raises UserError."""
    reader = _reader(source, options)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, True)
    return store(_foreign(reader, metadata), storage, options, now)


def _reader(source: Path, options: ImportOptions) -> FileSystemReader:
    if (source / _METADATA).is_file():
        demand_pickles_allowed(options, f"{source / _METADATA} is a pickle")
        return _Reader(source)
    if any(source.glob("*.safetensors")):
        return HuggingFaceStorageReader(str(source))
    raise UserError(f"--from: {source} has neither {_METADATA} nor safetensors; name the checkpoint's own folder")


class _Reader(FileSystemReader):
    """torch's reader with a safer eye for the list of pieces."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / _METADATA
        with path.open("rb") as file:
            metadata = _unpickled(file, path)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise UserError(f"--from: {path} leads out of its folder, to {place.relative_path}")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no list of pieces needs")
        return super().find_class(module, name)


def _unpickled(file: BinaryIO, path: Path) -> Metadata:
    try:
        metadata = _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise UserError(f"--from: {path} is not read: {error}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"--from: {path} is no list of pieces")
    return metadata


def _foreign(reader: FileSystemReader, metadata: Metadata) -> Foreign:
    tensors = {
        key: about
        for key, about in metadata.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and about.properties.dtype.is_floating_point
    }
    found = {key: match for key in metadata.state_dict_metadata if (match := _STATE.fullmatch(key))}
    states = {(match["name"], match["state"]): key for key, match in found.items()}
    weights = [key for key in tensors if key not in found]
    wrapper = wrapper_of(weights, {name for name, _ in states})
    place = {key.removeprefix(wrapper): key for key in weights}
    steps = {
        name: _count(reader, metadata, states.get((name, "step")))
        for name in place
        if (name, "exp_avg") in states and (name, "exp_avg_sq") in states
    }

    def whole(name: str, state: str) -> Tensor:
        return _tensor(reader, metadata, place[name] if state == "param" else states[name, state])

    shapes = {name: tuple(tensors[key].size) for name, key in place.items()}
    return Foreign(max(steps.values(), default=None), shapes, steps, whole)


def _count(reader: FileSystemReader, metadata: Metadata, key: str | None) -> int:
    """Updates of a parameter that has moments: at least one."""
    if key is None:
        return 1
    if isinstance(metadata.state_dict_metadata[key], BytesStorageMetadata):
        return max(int(_object(reader, metadata, key)), 1)
    return max(int(_tensor(reader, metadata, key)), 1)


def _tensor(reader: FileSystemReader, metadata: Metadata, key: str) -> Tensor:
    about = metadata.state_dict_metadata[key]
    assert isinstance(about, TensorStorageMetadata)
    target = torch.empty(about.size, dtype=about.properties.dtype)
    _read(reader, metadata, {key: target})
    return target


def _object(reader: FileSystemReader, metadata: Metadata, key: str) -> Any:
    into: dict[str, Any] = {key: None}
    return _read(reader, metadata, into)[key]


def _read(reader: FileSystemReader, metadata: Metadata, into: dict[str, Any]) -> dict[str, Any]:
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(into, metadata, True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return planner.state_dict


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
