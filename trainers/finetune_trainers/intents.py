"""What a checkpoint of a running training says of itself. Called by `saving` and `resuming`."""

from __future__ import annotations

import os
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from blake3 import blake3
from pydantic import JsonValue

from finetune_api.plan import CheckpointPlan, RunPlan
from finetune_trainers.checkpoint.documents import canonical
from finetune_trainers.checkpoint.engine_state import EngineState
from finetune_trainers.checkpoint.fence import Fence
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.manifest import BaseModelPin, DataState, Intent, Parent, World
from finetune_trainers.prepared import PreparedRun

__all__ = ["Intents", "attempt_number"]


def attempt_number() -> int:
    """Which try of the job this is, from 1 on."""
    return int(os.environ.get("FINETUNE_ATTEMPT", "1"))


class Intents:
    """Makes the intents of one training. All ranks make the same ones, but for the time."""

    def __init__(
        self, plan: RunPlan, settings: CheckpointPlan, prepared: PreparedRun, state: EngineState, world_size: int
    ) -> None:
        self._plan, self._settings, self._prepared = plan, settings, prepared
        self._state, self._world_size = state, world_size
        # Asked once: the answer takes milliseconds, in which training would stand still.
        self._versions = {package: version(package) for package in ("torch", "deepspeed")}
        self.parent: CheckpointId | None = None
        """What this attempt went on from."""

    def intent(self, fence: Fence, step: int, metrics: dict[str, float], now: datetime) -> Intent:
        """Of the state as it is, after `step` optimizer steps."""
        plan = self._plan
        consumed = step * plan.batch.global_batch_size // plan.method.uses_per_row
        epoch, cursor = divmod(consumed, self._prepared.sequences_per_epoch)
        lora = plan.tuning.lora
        return Intent(
            step=step,
            epoch=fence.epoch,
            token=fence.token,
            job=self._settings.job,
            attempt=attempt_number(),
            created=now,
            writer=self._versions,
            world=World(size=self._world_size, zero_stage=self._state.zero_stage),
            consumed_samples=consumed,
            global_batch=plan.batch.global_batch_size,
            base_model=BaseModelPin(
                source=plan.model.source, revision=plan.model.revision, digest=self._prepared.model.digest
            ),
            adapter=None if lora is None else lora.model_dump(mode="json", exclude_none=True),
            tensors=self._state.tensors(),
            param_groups=self._state.groups(),
            data=DataState(seed=plan.optimization.seed, epoch=epoch, cursor=cursor, digest=self._data_digest()),
            metrics=metrics,
            parent=None if self.parent is None else Parent(step=self.parent.step, epoch=self.parent.epoch),
        )

    def _data_digest(self) -> str:
        """Of what is learned from; and of what it was made of, which names the caches, wherever they are. The latter is
        all that the first checkpoints say, and changes with the code that makes it."""
        sources = self._prepared.data.train
        content: list[JsonValue] = [[source.content, source.weight] for source in sources]
        made_of: list[JsonValue] = [[Path(source.folder).name, source.weight] for source in sources]
        return "+".join(blake3(canonical(one)).hexdigest() for one in (content, made_of))
