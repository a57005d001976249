"""Checkpoints of a running training: saved by the loop, gone on from by the next attempt. `worker` makes them.

    resume   rank 0 takes the fence and offers the newest whole checkpoint of this training; every rank reads its part
    save     every rank writes what it holds; rank 0 publishes when all have said that their part is durable

A rank saves out of its own memory: nothing is gathered. The one agreement (did all of you write?) and rank 0's word
that it is published are small objects. Saving is synchronous: training waits until the checkpoint is durable. The world
size, the micro-batch and the ZeRO stage may be others when a training goes on.

A save that fails is told and does not end the training; the next one is tried when it is due.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from blake3 import blake3
from pydantic import ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from finetune_api.plan import CheckpointPlan, RunPlan
from finetune_api.progress import Stage
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.commit import abandon, begin, publish
from finetune_trainers.checkpoint.documents import canonical
from finetune_trainers.checkpoint.engine_state import EngineState, Loaded
from finetune_trainers.checkpoint.fence import Fence, SupersededError
from finetune_trainers.checkpoint.find import Rejected, newest_first
from finetune_trainers.checkpoint.folders import fetch_folder, folder_records, store_folder
from finetune_trainers.checkpoint.identity import differences
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.manifest import BaseModelPin, BlobRecord, DataState, Intent, Manifest, Parent, World
from finetune_trainers.checkpoint.reading import DamagedError, SliceReader
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.errors import StorageError, StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import sweep
from finetune_trainers.checkpoint.write import announce, write_rank
from finetune_trainers.context import WorkerContext
from finetune_trainers.engine import Engine
from finetune_trainers.loop import LoopMemory
from finetune_trainers.prepared import PreparedRun

__all__ = ["Checkpoints", "Resumed"]

_FOLDER = "checkpoints"
_LOOP, _RANDOM = "loop", "random"
_DAMAGED = (DamagedError, StorageMissingError, StorageTornError, ValidationError)
_STRIDE = 1_000_003
"""Between the random seeds of steps, for a rank that no rank before it has left its generator to."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """Where a training goes on."""

    step: int
    """Optimizer steps done."""
    memory: LoopMemory


@dataclass(frozen=True)
class _Read:
    """What a rank has read of a checkpoint."""

    engine: Loaded
    memory: LoopMemory
    random: dict[str, Tensor] | None
    """None: fewer ranks saved it, and this one had no part."""


class Checkpoints:
    """The checkpoints of one training, on one rank. `resume` comes first and once; all calls are collective."""

    def __init__(
        self,
        plan: RunPlan,
        settings: CheckpointPlan,
        prepared: PreparedRun,
        engine: Engine,
        context: WorkerContext,
        workdir: Path,
        best: Path | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`best` is the folder of the best parameters, where training stops early. Raises UserError when the engine's
        state cannot be read."""
        self.every_steps = settings.every_steps
        self._plan, self._settings, self._prepared = plan, settings, prepared
        self._engine, self._context, self._best, self._now = engine, context, best, now
        self._state = EngineState(engine, context.rank, context.world_size)
        self._uri = settings.uri or f"file://{workdir.absolute() / _FOLDER}"
        self._storage: Storage | None = None
        self._fence: Fence | None = None
        self._parent: CheckpointId | None = None

    def resume(self) -> Resumed | None:
        """Go on from the newest whole checkpoint of this training; None when there is none. Raises StorageError."""
        self._begin()
        offers = self._offers() if self._context.rank == 0 else iter(())
        while True:
            manifest = self._context.broadcast_object(next(offers, None))
            if manifest is None:
                return None
            read, damage = self._read(manifest)
            damages = [one for one in self._context.all_gather_object(damage) if one is not None]
            if read is not None and not damages:
                return self._go_on(manifest, read)
            self._tell(f"checkpoint {manifest.id} was rejected: {damages[0]}")

    def _begin(self) -> None:
        """Rank 0 takes the fence; the others learn it, and whether the store's conditional writes hold."""
        root = os.environ.get("FINETUNE_PVC_ROOT", "/mnt/pvc")
        taken: tuple[Fence, bool] | None = None
        if self._context.rank == 0:
            self._storage = open_storage(self._uri, root)
            owner = f"{self._plan.namespace}/{self._plan.name}, attempt {os.environ.get('FINETUNE_ATTEMPT', '1')}"
            fence, settled = begin(self._storage, owner, self._now())
            for checkpoint in settled.completed:
                self._tell(f"checkpoint {checkpoint} was completed: the attempt before had written all of it")
            taken = fence, self._storage.exclusive
        taken = self._context.broadcast_object(taken)
        assert taken is not None
        self._fence, exclusive = taken
        if self._storage is None:
            self._storage = open_storage(self._uri, root, exclusive=exclusive)

    def _offers(self) -> Iterator[Manifest]:
        """Whole checkpoints of this training, newest first; of the others it is told why they are not used."""
        assert self._storage is not None
        if not self._settings.resume:
            return
        mine = self._intent(0, LoopMemory(), ())
        for found in newest_first(self._storage):
            if isinstance(found, Rejected):
                self._tell(str(found))
            elif reasons := differences(found.intent, mine):
                self._tell(f"checkpoint {found.id} is not used: {'; '.join(reasons)}")
            else:
                yield found

    def _read(self, manifest: Manifest) -> tuple[_Read | None, str | None]:
        """What this rank needs, or what is wrong with it. Nothing is changed yet."""
        assert self._storage is not None
        try:
            loaded = self._state.read(SliceReader(self._storage, manifest), manifest)
            memory = LoopMemory.model_validate_json(self._aux(manifest, 0, _LOOP) or b"")
            random = self._aux(manifest, self._context.rank, _RANDOM)
            if self._context.rank == 0 and self._best is not None and manifest.intent.blobs:
                fetch_folder(self._storage, manifest.intent.blobs, self._best)
        except _DAMAGED as error:
            return None, str(error)
        return _Read(loaded, memory, None if random is None else load_tensors(random)), None

    def _aux(self, manifest: Manifest, rank: int, name: str) -> bytes | None:
        """An auxiliary file, verified; None when there was no such rank."""
        assert self._storage is not None
        if rank >= len(manifest.receipts):
            return None
        record = next(aux for aux in manifest.receipts[rank].aux if aux.name == name)
        data = self._storage.read(layout.folder(manifest.id) + record.file)
        if blake3(data).hexdigest() != record.digest:
            raise DamagedError(f"{record.file} is not what was saved")
        return data

    def _go_on(self, manifest: Manifest, read: _Read) -> Resumed:
        step = manifest.intent.step
        self._engine.begin_step(0.0, (step - 1) / self._prepared.total_steps)  # opens what had opened by then
        self._state.load(read.engine)
        self._state.loss_scale = read.memory.loss_scale
        if read.random is not None:
            _set_random(read.random, self._context.device)
        else:
            torch.manual_seed(self._plan.optimization.seed + self._context.rank + _STRIDE * step)
        self._parent = manifest.id
        self._tell(f"going on after step {step}, from checkpoint {manifest.id}")
        return Resumed(step, read.memory)

    def save(self, step: int, memory: LoopMemory) -> str | None:
        """Make a checkpoint, after `step` optimizer steps. It is durable when None is returned; otherwise there is
        none, for the reason that is returned. Raises SupersededError when a newer attempt has begun."""
        assert self._storage is not None, "resume comes first"
        assert self._fence is not None
        memory = memory.model_copy(update={"loss_scale": self._state.loss_scale})
        intent = self._intent(step, memory, self._best_files(memory))
        faults = [one for one in self._context.all_gather_object(self._write(intent, memory)) if one is not None]
        verdict: str | SupersededError | None = None
        if self._context.rank == 0:
            verdict = self._publish(intent, faults)
        verdict = self._context.broadcast_object(verdict)
        if isinstance(verdict, SupersededError):
            raise verdict
        return verdict

    def _best_files(self, memory: LoopMemory) -> tuple[BlobRecord, ...]:
        if self._best is None or memory.best_step is None or self._context.rank != 0:
            return ()
        return folder_records(self._best)

    def _write(self, intent: Intent, memory: LoopMemory) -> str | None:
        """This rank's part -> what went wrong."""
        assert self._storage is not None
        aux = {f"{_RANDOM}.safetensors": save_tensors(_random(self._context.device))}
        try:
            if self._context.rank == 0:
                announce(self._storage, intent)
                aux[f"{_LOOP}.json"] = memory.model_dump_json().encode()
                if self._best is not None:
                    store_folder(self._storage, self._best, intent.blobs)
            slices, data = self._state.slices(intent.tensors), self._state.data(intent.tensors)
            write_rank(self._storage, intent, self._context.rank, slices, data, aux)
        except (StorageError, OSError) as error:
            return str(error)
        return None

    def _publish(self, intent: Intent, faults: list[str]) -> str | SupersededError | None:
        """Rank 0: the manifest, then what is not kept any more -> why there is none."""
        assert self._storage is not None
        assert self._fence is not None
        try:
            if faults:
                abandon(self._storage, self._fence, intent.id, faults[0])
                raise StorageError(faults[0])
            manifest = publish(self._storage, self._fence, intent.id)
        except SupersededError as error:
            return error
        except StorageError as error:
            _log.warning("checkpoint %s could not be saved: %s", intent.id, error)
            return f"The checkpoint of step {intent.step} could not be saved, and training goes on: {error}"
        _log.info("checkpoint %s: %d bytes at %s", manifest.id, manifest.bytes, self._uri)
        self._sweep()
        return None

    def _sweep(self) -> None:
        """Deleting old ones may fail: there is another time."""
        assert self._storage is not None
        protected = [self._parent] if self._parent is not None else []
        try:
            sweep(self._storage, Retention(keep_last=self._settings.keep_last), self._fence, protected)
        except (StorageError, SupersededError) as error:
            _log.warning("old checkpoints could not be deleted: %s", error)

    def _intent(self, step: int, memory: LoopMemory, blobs: tuple[BlobRecord, ...]) -> Intent:
        assert self._fence is not None
        plan, consumed = self._plan, step * self._plan.batch.global_batch_size
        epoch, cursor = divmod(consumed, self._prepared.sequences_per_epoch)
        lora = plan.tuning.lora
        return Intent(
            step=step,
            epoch=self._fence.epoch,
            token=self._fence.token,
            job=self._settings.job,
            attempt=int(os.environ.get("FINETUNE_ATTEMPT", "1")),
            created=self._now(),
            writer={package: version(package) for package in ("torch", "deepspeed")},
            world=World(size=self._context.world_size, zero_stage=self._state.zero_stage),
            consumed_samples=consumed,
            global_batch=plan.batch.global_batch_size,
            base_model=BaseModelPin(
                source=plan.model.source, revision=plan.model.revision, digest=self._prepared.model.digest
            ),
            adapter=None if lora is None else lora.model_dump(mode="json", exclude_none=True),
            tensors=self._state.tensors(),
            param_groups=self._state.groups(),
            data=DataState(seed=plan.optimization.seed, epoch=epoch, cursor=cursor, digest=self._data_digest()),
            metrics=memory.metrics,
            parent=None if self._parent is None else Parent(step=self._parent.step, epoch=self._parent.epoch),
            blobs=blobs,
        )

    def _data_digest(self) -> str:
        """The caches are named by content: their names stand for the data, wherever the cache is."""
        sources = [[Path(source.folder).name, source.weight] for source in self._prepared.data.train]
        return blake3(canonical(sources)).hexdigest()  # type: ignore[arg-type]

    def _tell(self, sentence: str) -> None:
        _log.warning(sentence)
        self._context.report(Stage.LOADING_MODEL, urgent=True, message=sentence)


def _random(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
