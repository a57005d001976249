"""A checkpoint as torch.distributed.checkpoint has it: weights and AdamW's moments, for any number of ranks.

    model.<name>                                    weights in fp32
    optimizer.state.<name>.{step,exp_avg,exp_avg_sq}
    optimizer.param_groups.<n>.*                    as torch.optim.AdamW has them; the rate is the schedule's: 0 here

So `dcp.load({"model": ..., "optimizer": ...}, checkpoint_id=folder)` with the dictionaries of `get_state_dict` reads
it. torch's own writer and planner make the files; the planner is given tensors without data, which it reads out of
the checkpoint piece by piece when they are written. torch lists the pieces in a pickle, `.metadata`. Whoever wants no
pickle exports to `hf`, which torch's HuggingFaceStorageReader reads, without the moments.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from finetune_api.progress import Artifact
from finetune_trainers.artifact_folder import new_folder, seal
from finetune_trainers.checkpoint.exports import ExportOptions
from finetune_trainers.checkpoint.exports.destination import local_folder
from finetune_trainers.checkpoint.exports.training_state import TrainingState
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["write"]

_PIECE_BYTES = 64 << 20
"""Of a tensor in one piece: what memory holds for each of the writer's threads."""
_THREADS = 2
_TENSOR_STATES = ("exp_avg", "exp_avg_sq")


def write(storage: Storage, manifest: Manifest, to: str, options: ExportOptions) -> Artifact:
    """Raises UserError, DamagedError."""
    folder, state = local_folder(to), TrainingState(storage, manifest, options.role)
    assert folder is not None
    with new_folder(folder, "--to") as unfinished:
        # One file a piece: with one for all, torch's writer would keep every piece until the file is done.
        writer = FileSystemWriter(unfinished, single_file_per_rank=False, thread_count=_THREADS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            save(_dictionaries(state), storage_writer=writer, planner=_Planner(state), no_dist=True)
        return seal(unfinished, folder, "dcp", state.base)


def _dictionaries(state: TrainingState) -> dict[str, Any]:
    """As `get_state_dict` gives them, the large tensors without their data."""
    params = {name: torch.empty(shape, device="meta") for name, shape in state.shapes.items()}
    states = {
        name: {"step": torch.tensor(float(state.steps[name])), **dict.fromkeys(_TENSOR_STATES, params[name])}
        for name in state.shapes
        if state.steps[name]
    }
    return {"model": params, "optimizer": {"state": states, "param_groups": list(_param_groups(state, params))}}


def _param_groups(state: TrainingState, params: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    for group in state.groups:
        tensors = [torch.nn.Parameter(params[name]) for name in group.names]
        adamw = torch.optim.AdamW(tensors, lr=0.0, betas=group.betas, eps=group.eps, weight_decay=group.weight_decay)
        yield {**adamw.state_dict()["param_groups"][0], "params": list(group.names)}


class _Planner(DefaultSavePlanner):
    """Cuts tensors without data into pieces, and has the data when it is asked for."""

    def __init__(self, state: TrainingState) -> None:
        super().__init__()
        self._state = state
        self._names = {f"model.{name}": (name, "param") for name in state.shapes} | {
            f"optimizer.state.{name}.{key}": (name, key) for name in state.shapes for key in _TENSOR_STATES
        }

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [piece for item in plan.items for piece in self._pieces(item)]
        self.plan = SavePlan(items, planner_data=plan.planner_data)
        return self.plan

    def _pieces(self, item: WriteItem) -> Iterator[WriteItem]:
        if item.index.fqn not in self._names or item.tensor_data is None or not item.tensor_data.size:
            yield item
            return
        size = item.tensor_data.size
        rows = max(_PIECE_BYTES // max(4 * size[1:].numel(), 1), 1)
        properties = TensorProperties(dtype=torch.float32)
        for start in range(0, max(size[0], 1), rows):
            offsets = torch.Size([start] + [0] * (len(size) - 1))
            sizes = torch.Size([min(rows, size[0] - start), *size[1:]])
            data = TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, size)
            kind = WriteItemType.TENSOR if sizes == size else WriteItemType.SHARD
            yield WriteItem(MetadataIndex(item.index.fqn, offsets), kind, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        named = self._names.get(write_item.index.fqn)
        if named is None:
            return super().resolve_data(write_item)
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        first = chunk.offsets[0] * write_item.tensor_data.size[1:].numel() if chunk.offsets else 0
        return self._state.read(*named, first, first + chunk.sizes.numel()).reshape(chunk.sizes)
