"""What a worker may know of the group it belongs to: one small protocol, two implementations.

`RayTrainContext` is the product. `SingleProcessContext` serves machines without Ray, notebooks and tests.
Training code talks to this protocol only and never imports ray.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from finetune_api.plan import Device, RunPlan
from finetune_api.progress import Stage
from finetune_trainers.progress import PROGRESS_FILE, FileSink, Sink
from finetune_trainers.resizing import Room

__all__ = ["STOP_FILE", "RayTrainContext", "SingleProcessContext", "WorkerContext", "threads_per_worker"]

T = TypeVar("T")

STOP_FILE = "stop-requested"
"""The driver creates this file in the run's folder to ask for a clean stop; workers may be on other machines."""


class WorkerContext(Protocol):
    """A worker's place in its group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    """Workers on this machine."""
    device: torch.device

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place; the same tensor is returned."""
        ...

    def barrier(self) -> None: ...

    def broadcast_object(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        ...

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's `value`, in order of rank, on every rank."""
        ...

    def report(self, stage: Stage, urgent: bool = False, **figures: Any) -> None:
        """Tell the outside how far the run is; only rank 0's reports count."""
        ...

    def should_stop(self) -> bool:
        """Was a stop asked for? Ranks may see it at different times: agree before acting on it."""
        ...

    def preemption(self) -> object | None:
        """Word that a machine of the group is about to be taken away: the same object for the same word, None without
        one. Rank 0 decides what follows."""
        ...

    def has_room(self) -> bool:
        """Whether a larger group could start in the place of this one. Rank 0 decides what follows."""
        ...


class _FileSignals:
    """The half that both contexts share: progress and stop requests pass through files of the run's folder."""

    rank: int

    def __init__(self, workdir: Path) -> None:
        self._stop_file = workdir / STOP_FILE
        self._sink: Sink = FileSink(workdir / PROGRESS_FILE, on_stop=self._stop_file.touch)

    def report(self, stage: Stage, urgent: bool = False, **figures: Any) -> None:
        if self.rank == 0:
            self._sink.report(stage, urgent=urgent, **figures)

    def should_stop(self) -> bool:
        return self.rank == 0 and self._stop_file.exists()

    def preemption(self) -> object | None:
        return None

    def has_room(self) -> bool:
        return False


class SingleProcessContext(_FileSignals):
    """The only worker there is. Collectives are the identity."""

    rank = 0
    world_size = 1
    local_rank = 0
    local_world_size = 1

    def __init__(self, plan: RunPlan, workdir: Path) -> None:
        super().__init__(workdir)
        self.device = torch.device("cuda", 0) if plan.workers.device is Device.CUDA else torch.device("cpu")

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def barrier(self) -> None:
        return None

    def broadcast_object(self, value: T) -> T:
        return value

    def all_gather_object(self, value: T) -> list[T]:
        return [value]


class RayTrainContext(_FileSignals):
    """One worker of a Ray Train group, whose torch process group Ray has already set up."""

    def __init__(self, plan: RunPlan, workdir: Path, group_id: str | None = None) -> None:
        """`group_id` names the group to a driver that looks for room for a larger one."""
        import ray.train
        import ray.train.torch

        super().__init__(workdir)
        group = ray.train.get_context()
        self.rank = group.get_world_rank()
        self.world_size = group.get_world_size()
        self.local_rank = group.get_local_rank()
        self.device = ray.train.torch.get_device() if plan.workers.device is Device.CUDA else torch.device("cpu")
        self.local_world_size = group.get_local_world_size()
        self._preemptions = _preemptions()
        self._room = Room(group_id) if group_id is not None else None

    def preemption(self) -> object | None:
        return getattr(self._preemptions, "preemption_info", None)

    def has_room(self) -> bool:
        return self._room is not None and self._room.there_is()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast_object(self, value: T) -> T:
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        if self.world_size == 1:
            return [value]
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, value)
        return boxes


def _preemptions() -> object | None:
    """Where Ray's watcher leaves the word with this worker, without asking anybody; None where Ray has no such place.

    The public `ray.train.get_preemption_info` waits until all workers have called it, at every step.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        found: object = get_train_context().preemption_context
    except (ImportError, AttributeError, RuntimeError):
        return None
    return found


def threads_per_worker(cpus: float | None, num_workers_here: int) -> int:
    """Threads that one worker may compute with: its `cpus`, or an even share of this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cpus if cpus is not None else cores / num_workers_here
    return max(1, min(int(share), cores))
