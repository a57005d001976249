"""The best parameters so far, on disk. The loop saves them, the worker reads them when it writes the artifact."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from finetune_trainers.context import WorkerContext
from finetune_trainers.engine import Engine
from finetune_trainers.weights import WeightFiles, read_tensors, write_tensors

__all__ = ["BestParameters"]

SHARD_BYTES = 1 << 30


class BestParameters:
    """Trained parameters of one step in a folder, the last save alone. All calls but `read` are collective."""

    def __init__(self, folder: Path, engine: Engine, names: Sequence[str], context: WorkerContext) -> None:
        self._folder = folder
        self._engine = engine
        self._names = frozenset(names)
        self._is_writer = context.rank == 0

    def save(self, step: int) -> None:
        """Replace what is kept by the parameters as they are now."""
        tensors = self._engine.parameters(self._names)
        if not self._is_writer:
            for _ in tensors:
                pass
            return
        unfinished = self._folder.with_name(f".{self._folder.name}-{step}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_tensors(unfinished, tensors, shard_bytes=SHARD_BYTES)
        # The older best is deleted last: whatever happens in between, one of the two is on disk and whole.
        older = self._folder.with_name(f".{self._folder.name}-older")
        if self._folder.exists():
            shutil.rmtree(older, ignore_errors=True)
            self._folder.rename(older)
        unfinished.rename(self._folder)
        shutil.rmtree(older, ignore_errors=True)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """(name, CPU tensor) of what was saved last. Other ranks than the one that wrote it get nothing: they may be on
        a machine that does not see it."""
        if not self._is_writer:
            return iter(())
        files = WeightFiles.of(self._folder)
        assert files is not None, "read comes after save"
        return read_tensors(files)
