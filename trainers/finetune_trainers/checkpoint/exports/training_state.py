"""Weights and AdamW's state of a checkpoint, tensor by tensor, for the formats that take both (`dcp`, `deepspeed`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from finetune_trainers.checkpoint.manifest import Manifest, ParamGroup, SliceKey
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.slices import Wanted
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["Group", "TrainingState"]

_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Group:
    """A group of the optimizer."""

    names: tuple[str, ...]
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class TrainingState:
    """What a checkpoint holds of one role."""

    def __init__(self, storage: Storage, manifest: Manifest, role: str) -> None:
        """Raises UserError when it holds nothing of the role."""
        self._reader = SliceReader(storage, manifest, _READ_BYTES)
        self._role = role
        intent = manifest.intent
        tensors = [tensor for tensor in intent.tensors if tensor.role == role and tensor.states.get("param") == "F32"]
        if not tensors:
            raise UserError(f"--role: checkpoint {manifest.id} holds no parameters of {role!r}")
        self.step = intent.step
        self.samples = intent.consumed_samples
        self.shapes = {tensor.name: tensor.shape for tensor in tensors}
        groups = [group for group in intent.param_groups if group.role == role]
        counted = {name: count for group in groups for name, count in _steps(group).items()}
        self.steps = {tensor.name: counted.get(tensor.name, 0) if len(tensor.states) == 3 else 0 for tensor in tensors}
        """Updates that AdamW has made of each parameter; 0 where it has no moments."""
        self.groups = [_group(group) for group in groups] or [Group(tuple(self.shapes), 0.0, (0.9, 0.999), 1e-8)]
        pin = intent.base_model
        self.base: dict[str, Any] = (
            {} if pin is None else {"source": pin.source, "revision": pin.revision, "digest": pin.digest}
        )

    def read(self, name: str, state: str, start: int, end: int) -> Tensor:
        """Elements [start, end), flat, fp32. Raises DamagedError."""
        values = torch.empty(end - start, dtype=torch.float32)
        if start < end:
            memory: Any = values.numpy()  # numpy does not say that its arrays are buffers
            self._reader.read({Wanted(SliceKey(self._role, name, state), start, end): memoryview(memory).cast("B")})
        return values

    def whole(self, name: str, state: str) -> Tensor:
        """A tensor in its shape."""
        shape = self.shapes[name]
        return self.read(name, state, 0, torch.Size(shape).numel()).reshape(shape)


def _steps(group: ParamGroup) -> dict[str, int]:
    return dict(
        zip(group.tensors, cast("list[int]", group.options.get("steps", [0] * len(group.tensors))), strict=True)
    )


def _group(group: ParamGroup) -> Group:
    options: dict[str, Any] = dict(group.options)
    first, second = options.get("betas", (0.9, 0.999))
    return Group(
        group.tensors, float(options.get("weight_decay", 0.0)), (first, second), float(options.get("eps", 1e-8))
    )
