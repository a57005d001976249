"""How large the pods of a job are: what the job says, otherwise its runtime, otherwise a modest guess.

Requests equal limits, so that the pods are Guaranteed: a worker that is slowed down or evicted for memory that it was
never promised takes all the others along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_api.job import FineTuneJob
from finetune_api.plan import RunPlan
from finetune_api.runtime import FineTuneRuntimeSpec
from finetune_api.spec.fields import memory_bytes
from finetune_operator.resources.metadata import Document

__all__ = ["Size", "head_size", "worker_size"]

_HEAD_CPUS = 2.0
_HEAD_MEMORY = "8Gi"
_CPUS_PER_GPU = 8.0
_CPUS_WITHOUT_GPU = 2.0
_GIB_PER_GPU = 32
_GIB_WITHOUT_GPU = 8


@dataclass(frozen=True)
class Size:
    """One pod. `memory` is a Kubernetes quantity in Mi, Gi or Ti."""

    cpus: float
    memory: str
    gpus: int = 0
    gpu_resource: str = ""

    @property
    def shared_memory(self) -> str:
        """Of /dev/shm: half of the pod's memory. What is in it counts as the pod's memory, so this is a bound for
        runaways and no further demand; the 64 MiB that containers have otherwise are too few for NCCL and gloo."""
        return f"{max(64, memory_bytes(self.memory) // 2**21)}Mi"

    @property
    def threads(self) -> int:
        """Threads that one training process may compute with: the cores, shared among the GPUs' processes."""
        return max(1, math.floor(self.cpus / max(self.gpus, 1)))

    def resources(self) -> Document:
        """A container's `resources`."""
        amounts = {"cpu": _cores(self.cpus), "memory": self.memory}
        if self.gpus:
            amounts[self.gpu_resource] = str(self.gpus)
        return {"requests": amounts, "limits": dict(amounts)}


def head_size(job: FineTuneJob, runtime: FineTuneRuntimeSpec) -> Size:
    """The head: Ray's own services and the driver, which reads all rows of data once and trains nothing."""
    asked, pool = job.spec.cluster.head, runtime.head
    return Size(asked.cpus or pool.cpus or _HEAD_CPUS, asked.memory or pool.memory or _HEAD_MEMORY)


def worker_size(job: FineTuneJob, plan: RunPlan, runtime: FineTuneRuntimeSpec) -> Size:
    """One worker, which runs a training process for each of its GPUs, or one on its cores."""
    gpus = plan.workers.gpus
    cpus = _CPUS_PER_GPU * gpus if gpus else _CPUS_WITHOUT_GPU
    memory = f"{_GIB_PER_GPU * gpus if gpus else _GIB_WITHOUT_GPU}Gi"
    return Size(
        cpus=plan.workers.cpus or cpus,
        memory=job.spec.cluster.workers.memory or runtime.workers.memory or memory,
        gpus=gpus,
        gpu_resource=runtime.gpu_resource,
    )


def _cores(cpus: float) -> str:
    """As the API writes it back: whole cores, or thousandths."""
    thousandths = max(1, round(cpus * 1000))
    return str(thousandths // 1000) if thousandths % 1000 == 0 else f"{thousandths}m"
