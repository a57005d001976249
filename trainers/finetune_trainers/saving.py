"""Checkpoints of a running training: saved by the loop, gone on from by the next attempt. `worker` makes them.

    resume      rank 0 takes the fence and offers the newest whole checkpoint of this training; ranks read their parts
    votes       what a rank knows at the end of a step, as numbers; the step's own all-reduce adds them up
    after_step  all ranks do the same with the sums: copy their state into shared memory, or leave a due one out
    finish      wait until everything that was staged is durable, or has failed

Training stands still for a copy in memory, and before it where a method confirms what is to be saved. A writer process
of each rank does the rest, and goes on when its trainer is killed (`checkpoint/writer`). Nothing is gathered, and ranks
exchange nothing while they save: a checkpoint is complete when the receipts of all lie in the storage. The world size,
the micro-batch and the ZeRO stage may be others when a training goes on.

A save that fails is told and does not end the training; the next one is tried when it is due.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as save_tensors

from finetune_api.plan import CheckpointPlan, RunPlan
from finetune_api.progress import Stage
from finetune_trainers.checkpoint.commit import begin
from finetune_trainers.checkpoint.engine_state import EngineState
from finetune_trainers.checkpoint.fence import Fence, SupersededError
from finetune_trainers.checkpoint.flushes import Flushes
from finetune_trainers.checkpoint.manifest import Manifest, Parent
from finetune_trainers.checkpoint.orphans import wait_for_writers
from finetune_trainers.checkpoint.retention import Best, Retention
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.writer import saved_checkpoint
from finetune_trainers.checkpoint.writer_protocol import Begin
from finetune_trainers.context import WorkerContext
from finetune_trainers.engine import Engine
from finetune_trainers.intents import Intents, attempt_number
from finetune_trainers.loop import LoopMemory, SaveNews
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.resuming import LOOP, RANDOM, Resumed, Search, load, random_state
from finetune_trainers.save_interval import SaveInterval

__all__ = ["Checkpoints", "Votes"]

FINISH_SECONDS = 600.0
"""How long the end of a training waits for what is still being written. The writers go on after it."""
VISIBLE_SECONDS = 120.0
"""How long rank 0 looks for what the others say that they have written."""
MOST_COPIERS = 4
"""Threads: more do not make memory faster."""
_FOLDER = "checkpoints"
_log = logging.getLogger(__name__)


class Votes(NamedTuple):
    """What ranks know at the end of a step, each as a number that is summed over them."""

    due: float = 0.0
    """Rank 0: a checkpoint is due after this step."""
    behind: float = 0.0
    """A rank has no buffer to stage into."""
    failed: float = 0.0
    """A rank knows of a failure that it has not told."""
    superseded: float = 0.0
    """Rank 0: a newer attempt has begun."""
    writing: float = 0.0
    """A rank's part of something is not durable yet."""
    preempted: float = 0.0
    """Rank 0: a machine is about to be taken away, and nothing was saved since that was known."""
    resize: float = 0.0
    """Rank 0: it is time for a larger group of workers, for which there is room."""


@dataclass(frozen=True)
class _Taken:
    """What rank 0 tells the others when it has taken the fence."""

    fence: Fence
    exclusive: bool


class Checkpoints:
    """The checkpoints of one training, on one rank. `resume` comes first and once; `close` comes last in any case.

    All ranks call the same methods after the same steps.
    """

    def __init__(
        self,
        plan: RunPlan,
        settings: CheckpointPlan,
        prepared: PreparedRun,
        engine: Engine,
        context: WorkerContext,
        workdir: Path,
        best: Path | None = None,
        helpers: Collection[str] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`best` is the folder of the best parameters, where training stops early; `helpers` are parameters that are no
        part of the artifact. Raises UserError when the engine's state cannot be read."""
        self._plan, self._settings, self._prepared = plan, settings, prepared
        self._engine, self._context, self._best, self._now, self._clock = engine, context, best, now, clock
        self._state = EngineState(engine, context.rank, context.world_size, helpers)
        self._intents = Intents(plan, settings, prepared, self._state, context.world_size)
        self._uri = settings.uri or f"file://{workdir.absolute() / _FOLDER}"
        self._pvc_root = os.environ.get("FINETUNE_PVC_ROOT", "/mnt/pvc")
        self._iteration = plan.method.steps_per_iteration
        self._interval = SaveInterval(settings, clock, self._iteration)
        self._storage: Storage | None = None
        self._fence: Fence | None = None
        self._flushes: Flushes | None = None
        self._staged_step: int | None = None
        self._reported_step: int | None = None
        self._all_written_at: float | None = None
        self._heeded: object | None = None
        """The preemption that the last checkpoint was made in the knowledge of."""
        self._resize_at = math.inf
        """When this group of workers may give way to a larger one."""
        self._told_of_metric = False
        self._told_steps: set[int] = set()
        """Whose failure every rank knows of."""
        self.rejected: list[str] = []
        """Checkpoints that this attempt would not go on from, with the reason, the newest first. On rank 0."""
        self.blocked_seconds = 0.0
        """For which training has stood still, in all."""

    def resume(self) -> Resumed | None:
        """Go on from the newest whole checkpoint of this training; None when there is none. Raises StorageError."""
        taken = self._context.broadcast_object(self._take_fence() if self._context.rank == 0 else None)
        assert taken is not None
        self._fence = taken.fence
        if self._storage is None:
            self._storage = open_storage(self._uri, self._pvc_root, exclusive=taken.exclusive)
        search = Search(self._storage, self._state, self._context, self._best, self._tell)
        mine = self._intents.intent(taken.fence, 0, {}, self._now())
        found = search.find(mine if self._settings.resume else None)
        self.rejected = search.rejected
        self._tell_of_others(search.others)
        resumed = None
        if found is not None:
            seed, total_steps = self._plan.optimization.seed, self._prepared.total_steps
            load(found, self._engine, self._state, self._context, total_steps, seed)
            self._intents.parent, step = found.manifest.id, found.manifest.intent.step
            self._staged_step = step
            self._tell(f"going on after step {step}, from checkpoint {found.manifest.id}")
            saved = saved_checkpoint(self._uri, found.manifest, found.manifest.intent.created)
            resumed = Resumed(step, found.read.memory, saved)
        self._flushes = Flushes(self._begin(taken), self._clock)
        self._may_give_way_later()
        return resumed

    def _take_fence(self) -> _Taken:
        self._storage = open_storage(self._uri, self._pvc_root)
        if (seconds := wait_for_writers(self._storage)) >= 1:
            _log.info("waited %.0f s for what the attempt before had still to write", seconds)
        if not self._storage.exclusive:
            self._tell(
                f"the store at {self._uri} does not honour conditional writes (If-None-Match). No checkpoint is torn by"
                " that; but of two attempts that run at once both may publish, and the later one's counts"
            )
        owner = f"{self._plan.namespace}/{self._plan.name}, attempt {attempt_number()}"
        fence, settled = begin(self._storage, owner, self._now())
        for checkpoint in settled.completed:
            self._tell(f"checkpoint {checkpoint} was completed: the attempt before had written all of it")
        return _Taken(fence, self._storage.exclusive)

    def _tell_of_others(self, others: Sequence[Manifest]) -> None:
        if others:
            what = "A checkpoint" if len(others) == 1 else f"{len(others)} checkpoints"
            self._tell(
                f"{what} of another training ({sum(one.bytes for one in others):,} bytes) at {self._uri}; the newest"
                f" stays until somebody says finetune ckpt gc {self._uri} --drop-others"
            )

    def _begin(self, taken: _Taken) -> Begin:
        settings, parent = self._settings, self._intents.parent
        best = settings.keep_best
        return Begin(
            uri=self._uri,
            pvc_root=self._pvc_root,
            exclusive=taken.exclusive,
            rank=self._context.rank,
            fence=taken.fence,
            retention=Retention(
                keep_last=settings.keep_last,
                keep_every=settings.keep_every,
                keep_best=None if best is None else Best(metric=best.metric, mode=best.mode, count=best.count),
                quota_bytes=settings.quota_bytes,
            ),
            protected=None if parent is None else Parent(step=parent.step, epoch=parent.epoch),
            expected_bytes=self._state.num_bytes,
        )

    def votes(self, step: int) -> Votes:
        """What this rank knows when `step` optimizer steps are nearly done."""
        flushes = self._started
        flushes.poll()
        self._forget_told()
        return Votes(
            due=float(self._context.rank == 0 and self._interval.is_due(step)),
            behind=float(flushes.is_behind),
            failed=float(bool(flushes.failures)),
            superseded=float(flushes.superseded is not None),
            writing=float(flushes.is_writing),
            preempted=float(step % self._iteration == 0 and self._preemption() is not None),
            resize=float(step % self._iteration == 0 and self._should_give_way(step)),
        )

    def _preemption(self) -> object | None:
        """A word of a preemption that nothing was saved for yet. Training goes on: it may come late, or not at all."""
        word = self._context.preemption() if self._context.rank == 0 else None
        return word if word != self._heeded else None

    def _should_give_way(self, step: int) -> bool:
        """Not too soon, lest training be nothing but starts, and never after the last step."""
        is_time = self._clock() >= self._resize_at and step < self._prepared.total_steps
        return self._context.rank == 0 and is_time and self._context.has_room()

    def _may_give_way_later(self) -> None:
        elastic = self._plan.workers.elastic
        self._resize_at = math.inf if elastic is None else self._clock() + elastic.resize_after_seconds

    def after_step(self, step: int, sums: Sequence[float], memory: Callable[[], LoopMemory]) -> SaveNews:
        """Act on the sums of all ranks' votes. Raises SupersededError when a newer attempt has begun."""
        votes, failures, skipped = Votes(*sums), [], None
        if votes.superseded:
            raise SupersededError(self._started.superseded or "a newer attempt of the run has begun")
        if votes.failed:
            failures = self._settle_failures()
        self._give_up_the_invisible(nobody_writes=not votes.writing)
        if votes.resize:
            self._may_give_way_later()  # should no checkpoint come of it
            failures += self._commit(step, memory)
            published = self._started.published
            is_whole = self._context.broadcast_object(published is not None and published.step == step)
            return self._news(failures)._replace(gives_way=is_whole)
        if votes.preempted and not votes.behind and step != self._staged_step:
            self._stage(step, memory)
        elif votes.due and step != self._staged_step:
            if votes.behind and self._settings.when_behind == "skip":
                skipped = (
                    f"No checkpoint of step {step} was made: the two before it are still being written"
                    " (spec.checkpoint.whenBehind is skip)"
                )
            else:
                self._stage(step, memory)
        return self._news(failures, skipped)

    def finish(self, step: int, memory: Callable[[], LoopMemory] | None) -> SaveNews:
        """The last call but `close`: save `step` too, unless `memory` is None or it is saved, and wait until everything
        is durable, ten minutes at most. Raises SupersededError."""
        flushes, deadline = self._started, self._clock() + FINISH_SECONDS
        failures = self._commit(step, memory)
        flushes.wait(lambda: not flushes.publishing, deadline)
        self._forget_told()
        failures += [_failed(step, reason) for step, reason in flushes.failures.items()]
        if flushes.is_writing or flushes.publishing:
            failures.append(
                f"The last checkpoint is not whole after {FINISH_SECONDS:.0f} s; its writer goes on without the run"
            )
        superseded = self._context.broadcast_object(flushes.superseded)
        flushes.close(deadline)
        if superseded is not None:
            raise SupersededError(superseded)
        return self._news(failures)

    def _commit(self, step: int, memory: Callable[[], LoopMemory] | None) -> list[str]:
        """Save `step` too, unless `memory` is None or it is saved, and wait until everything is durable, or given up
        for being invisible to rank 0. Collective -> failures to tell."""
        flushes, deadline = self._started, self._clock() + FINISH_SECONDS
        if memory is not None and step != self._staged_step:
            self._stage(step, memory)
        flushes.wait(lambda: not flushes.is_writing, deadline)
        failures = self._settle_failures()
        if not any(self._context.all_gather_object(flushes.is_writing)):
            flushes.wait(lambda: not flushes.publishing, min(deadline, self._clock() + VISIBLE_SECONDS))
            for number in flushes.publishing:
                flushes.give_up(number, self._invisible)
        return failures

    def close(self) -> None:
        """The writer finishes what it was given, and is not waited for."""
        if self._flushes is not None:
            self._flushes.close()

    @property
    def _started(self) -> Flushes:
        assert self._flushes is not None, "resume comes first"
        return self._flushes

    def _stage(self, step: int, asked: Callable[[], LoopMemory]) -> None:
        """Copy this rank's part. What goes wrong is told with the votes of the next step. Collective."""
        assert self._fence is not None
        began, flushes = self._clock(), self._started
        memory = asked()  # on all ranks, whatever one of them finds below: the method may confirm the weights first
        self._staged_step, self._heeded = step, self._context.preemption()
        if not flushes.wait(lambda: not flushes.is_behind, began + FINISH_SECONDS):
            flushes.failures[step] = f"no earlier one was written within {FINISH_SECONDS:.0f} s"
            return
        self._tell_of_unknown_metric(memory.seen_metrics)
        scaling = {"loss_scale": self._state.loss_scale, "loss_scale_counts": self._state.loss_scale_counts}
        memory = memory.model_copy(update=scaling)
        intent = self._intents.intent(self._fence, step, memory.metrics, self._now())
        aux = {f"{RANDOM}.safetensors": save_tensors(random_state(self._context.device))}
        if self._context.rank == 0:
            aux[f"{LOOP}.json"] = memory.model_dump_json().encode()
        try:
            folder = self._best_files(step) if memory.best_step is not None else None
            slices, fill = self._state.slices(intent.tensors), self._state.fill(intent.tensors)
            flushes.stage(intent, slices, fill, aux, folder, self._copiers)
        except OSError as error:
            flushes.failures[step] = str(error)
            return
        blocked = self._clock() - began
        self.blocked_seconds += blocked
        self._interval.saved(blocked)
        _log.info("checkpoint of step %d: training stood still for %.3f s", step, blocked)

    def _tell_of_unknown_metric(self, metrics: Collection[str]) -> None:
        """Once, of a metric by which the best are to be kept and that there is none of."""
        best = self._settings.keep_best
        if best is None or best.metric in metrics or self._told_of_metric or self._context.rank != 0:
            return
        self._told_of_metric = True
        self._tell(
            f"spec.checkpoint.keepBest.metric: {best.metric} is no figure of this run so far, and no checkpoint is kept"
            f" for it; there are {', '.join(metrics)}",
            Stage.TRAINING,
        )

    @property
    def _copiers(self) -> int:
        """Threads that copy: of a processor that trains no more than this process has; a device has one way out."""
        return min(torch.get_num_threads(), MOST_COPIERS) if self._context.device.type == "cpu" else 1

    def _best_files(self, step: int) -> Path | None:
        """Rank 0: a folder with the files of the best parameters as they are now. Links: a better one replaces the
        folder, and changes no file."""
        if self._best is None or self._context.rank != 0 or not self._best.is_dir():
            return None
        folder = self._best.with_name(f".{self._best.name}-of-step-{step}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in self._best.iterdir():
            try:
                (folder / file.name).hardlink_to(file)
            except OSError:  # a file system without links
                shutil.copyfile(file, folder / file.name)
        return folder

    def _give_up_the_invisible(self, nobody_writes: bool) -> None:
        """Rank 0: parts that all ranks have written and that its writer does not find lie somewhere else."""
        flushes = self._started
        if not (nobody_writes and flushes.publishing):
            self._all_written_at = None
        elif self._all_written_at is None:
            self._all_written_at = self._clock()
        elif self._clock() - self._all_written_at >= VISIBLE_SECONDS:
            for step in flushes.publishing:
                flushes.give_up(step, self._invisible)

    @property
    def _invisible(self) -> str:
        return (
            f"all {self._context.world_size} processes have written their part, and the first one does not find all of"
            f" them; {self._uri} must be the same place on every machine"
        )

    def _settle_failures(self) -> list[str]:
        """All ranks learn of each other's failures; rank 0 gives those checkpoints up. Collective -> what to tell."""
        flushes = self._started
        known: dict[int, str] = {}
        for rank, failures in enumerate(self._context.all_gather_object(dict(flushes.failures))):
            for step, reason in failures.items():
                known.setdefault(step, reason)
                if self._context.rank == 0 and rank != 0:
                    flushes.give_up(step, reason)
        self._told_steps |= known.keys()
        self._forget_told()
        return [_failed(step, reason) for step, reason in sorted(known.items())]

    def _forget_told(self) -> None:
        failures = self._started.failures
        for step in self._told_steps & failures.keys():
            del failures[step]

    def _news(self, failures: Sequence[str], skipped: str | None = None) -> SaveNews:
        flushes = self._started
        published = flushes.published
        if published is None or published.step == self._reported_step:
            published = None
        else:
            self._reported_step = published.step
            self._interval.flushed(flushes.flush_seconds or 0.0)
        for message in (*failures, skipped) if self._context.rank == 0 else ():
            if message is not None:
                _log.warning(message)
        return SaveNews(published, " ".join(failures) or None, skipped)

    def _tell(self, sentence: str, stage: Stage = Stage.LOADING_MODEL) -> None:
        _log.warning(sentence)
        self._context.report(stage, urgent=True, message=sentence)


def _failed(step: int, reason: str) -> str:
    return f"The checkpoint of step {step} could not be saved, and training goes on: {reason}"
