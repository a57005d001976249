"""Finds the checkpoint that a training goes on from, and puts it into the engine. Called by `saving`, once an attempt.

Rank 0 offers whole checkpoints of this very training, the newest first; every rank reads its part of one; and when all
have what they need, all go on from it. What is passed over is told with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from pydantic import ValidationError
from safetensors.torch import load as load_tensors
from torch import Tensor

from finetune_api.progress import SavedCheckpoint
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.engine_state import EngineState, Loaded
from finetune_trainers.checkpoint.find import Rejected, newest_first
from finetune_trainers.checkpoint.folders import fetch_folder
from finetune_trainers.checkpoint.identity import differences
from finetune_trainers.checkpoint.manifest import Intent, Manifest
from finetune_trainers.checkpoint.reading import DamagedError, SliceReader
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.context import WorkerContext
from finetune_trainers.engine import Engine
from finetune_trainers.loop import LoopMemory

__all__ = ["LOOP", "RANDOM", "Found", "Read", "Resumed", "Search", "load", "random_state"]

LOOP, RANDOM = "loop", "random"
"""Auxiliary files: what the loop remembers (rank 0's), and each rank's random generators."""

_DAMAGED = (DamagedError, StorageMissingError, StorageTornError, ValidationError)
_STRIDE = 1_000_003
"""Between the random seeds of steps, for a rank that no rank before it has left its generator to."""


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on."""

    step: int
    """Optimizer steps done."""
    memory: LoopMemory
    checkpoint: SavedCheckpoint


@dataclass(frozen=True)
class Read:
    """What a rank has read of a checkpoint."""

    engine: Loaded
    memory: LoopMemory
    random: dict[str, Tensor] | None
    """None: fewer ranks saved it, and this one had no part."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that all ranks have read."""

    manifest: Manifest
    read: Read


class Search:
    """One search. `find` is collective."""

    def __init__(
        self,
        storage: Storage,
        state: EngineState,
        context: WorkerContext,
        best: Path | None,
        tell: Callable[[str], None],
    ) -> None:
        """`best` is where rank 0 keeps the best parameters; `tell` takes sentences for people."""
        self._storage, self._state, self._context, self._best, self._tell = storage, state, context, best, tell
        self.rejected: list[str] = []
        """"id: reason" of each that was passed over, the newest first. On rank 0."""
        self.others: list[Manifest] = []
        """Of these, those of other trainings."""

    def find(self, mine: Intent | None) -> Found | None:
        """The newest that is whole and of the training that would save `mine` (rank 0's; None: look for none)."""
        offers = self._offers(mine) if mine is not None else iter(())
        while True:
            manifest = self._context.broadcast_object(next(offers, None))
            if manifest is None:
                return None
            read, damage = self._read(manifest)
            damages = [one for one in self._context.all_gather_object(damage) if one is not None]
            if read is not None and not damages:
                return Found(manifest, read)
            self._reject(str(manifest.id), damages[0], f"checkpoint {manifest.id} was rejected: {damages[0]}")

    def _offers(self, mine: Intent) -> Iterator[Manifest]:
        for found in newest_first(self._storage):
            if isinstance(found, Rejected):
                self._reject(str(found.checkpoint), str(found.damages[0]), str(found))
            elif reasons := differences(found.intent, mine):
                reason = "; ".join(reasons)
                self.others.append(found)
                self._reject(str(found.id), reason, f"checkpoint {found.id} is not used: {reason}")
            else:
                yield found

    def _reject(self, checkpoint: str, reason: str, sentence: str) -> None:
        self.rejected.append(f"{checkpoint}: {reason}")
        self._tell(sentence)

    def _read(self, manifest: Manifest) -> tuple[Read | None, str | None]:
        """What this rank needs, or what is wrong with it. Nothing is changed yet."""
        try:
            loaded = self._state.read(SliceReader(self._storage, manifest), manifest)
            memory = LoopMemory.model_validate_json(self._aux(manifest, 0, LOOP) or b"")
            random = self._aux(manifest, self._context.rank, RANDOM)
            if self._context.rank == 0 and self._best is not None and manifest.intent.blobs:
                fetch_folder(self._storage, manifest.intent.blobs, self._best)
        except _DAMAGED as error:
            return None, str(error)
        return Read(loaded, memory, None if random is None else load_tensors(random)), None

    def _aux(self, manifest: Manifest, rank: int, name: str) -> bytes | None:
        """An auxiliary file, verified; None when there was no such rank."""
        if rank >= len(manifest.receipts):
            return None
        record = next(aux for aux in manifest.receipts[rank].aux if aux.name == name)
        data = self._storage.read(layout.folder(manifest.id) + record.file)
        if blake3(data).hexdigest() != record.digest:
            raise DamagedError(f"{record.file} is not what was saved")
        return data


def load(found: Found, engine: Engine, state: EngineState, context: WorkerContext, total_steps: int, seed: int) -> None:
    """Put what was read into the engine and into the random generators. Collective under DeepSpeed."""
    step, read = found.manifest.intent.step, found.read
    engine.begin_step(0.0, (step - 1) / total_steps)  # opens what had opened by then
    state.load(read.engine)
    state.loss_scale = read.memory.loss_scale
    state.loss_scale_counts = read.memory.loss_scale_counts
    if read.random is not None:
        _set_random(read.random, context.device)
    else:
        torch.manual_seed(seed + context.rank + _STRIDE * step)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
