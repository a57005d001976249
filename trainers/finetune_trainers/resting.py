"""Frozen models that are asked now and then: in between, their weights lie in their files alone.

A reference or a reward model is asked for a short part of an iteration. While the policy learns, which is when the most
memory is in use, the operating system may use for others what they would take. On CPUs only: of a device's memory, what
comes back would come slowly. Called by `online.models` and `rewards.judge`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune_trainers.errors import StorageError
from finetune_trainers.weights import BrokenWeightsError, Place, WeightFiles

__all__ = ["RestingWeights"]

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OF_ADAPTED = "base_model.model."
"""What PEFT writes before each name of the model that it wraps."""


class RestingWeights:
    """Those of one frozen model. They are there inside `at_work` only. Of one that is split over ranks none rest."""

    def __init__(self, module: nn.Module, folder: Path) -> None:
        """`folder` is what `module` was loaded from, and nothing trains it. A parameter rests if it is found there
        with the very values that it has; the others, such as an adapter's, stay where they are."""
        self._resting: list[tuple[nn.Parameter, _Stored]] = []
        for parameter, stored in _found(module, folder):
            if torch.equal(stored.read(parameter.dtype), parameter):
                self._resting.append((parameter, stored))
        self._rest()

    @property
    def num_resting_bytes(self) -> int:
        """What the model needs less in memory while it rests."""
        return sum(stored.num_elements * parameter.element_size() for parameter, stored in self._resting)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The weights are in memory inside. Raises StorageError when they can no longer be read."""
        try:
            for parameter, stored in self._resting:
                parameter.data = stored.read(parameter.dtype)
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        for parameter, _ in self._resting:
            parameter.data = parameter.new_empty(0)


class _File:
    """A file that stays open: what replaces it under its name is another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self._was = self._looks()

    def read(self, start: int, into: Tensor) -> None:
        """Fills `into`, uint8. Raises StorageError."""
        view = memoryview(into.numpy().data)
        try:
            if self._looks() != self._was:
                raise StorageError(f"{self.path} was changed while a run reads its weights from it")
            while len(view):
                num_read = os.preadv(self.descriptor, [view], start)
                if not num_read:
                    raise StorageError(f"{self.path} has become shorter while a run reads its weights from it")
                view, start = view[num_read:], start + num_read
        except OSError as error:
            raise StorageError(f"{self.path} can no longer be read: {error.strerror}") from error

    def _looks(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class _Stored:
    """Where the values of a parameter are."""

    file: _File
    place: Place
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return (self.place.end - self.place.start) // _TYPES[self.place.dtype].itemsize

    def read(self, dtype: torch.dtype) -> Tensor:
        """The values, as `dtype`."""
        raw = torch.empty(self.place.end - self.place.start, dtype=torch.uint8)
        self.file.read(self.place.start, raw)
        return raw.view(_TYPES[self.place.dtype]).view(self.shape).to(dtype)


def _found(module: nn.Module, folder: Path) -> Iterator[tuple[nn.Parameter, _Stored]]:
    """The parameters that are on the CPU and, by name, type and shape, in the files of `folder`."""
    try:
        files = WeightFiles.of(folder)
    except BrokenWeightsError:
        return  # whoever loaded the model read it in another way
    if files is None:
        return
    opened: dict[str, _File] = {}
    for name, parameter in module.named_parameters():
        stored = files.stored_name(name.removeprefix(_OF_ADAPTED).replace(".base_layer.", "."))
        if stored is None or parameter.device.type != "cpu" or parameter.requires_grad:
            continue
        place, shape = files.places[stored], files.shapes[stored]
        if place.dtype not in _TYPES or shape != tuple(parameter.shape) or not parameter.numel():
            continue
        if place.shard not in opened:
            opened[place.shard] = _File(folder / place.shard)
        yield parameter, _Stored(opened[place.shard], place, shape)
