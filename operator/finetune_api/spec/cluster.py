"""What the job runs on, and how ZeRO spreads the training state over it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from finetune_api.base import Contract, Rule
from finetune_api.spec.fields import DnsLabel, ImageName, Memory
from finetune_api.spec.pods import Pods

__all__ = ["Cluster", "DeepSpeed", "Head", "Offload", "RuntimeRef", "Workers"]


class RuntimeRef(Contract):
    """Which FineTuneRuntime (the platform's pool and defaults) the job runs on."""

    name: DnsLabel
    """Name of a FineTuneRuntime. It cannot be changed after the job is created."""

    rules = (Rule(cel="self.name == oldSelf.name", message="runtimeRef.name cannot be changed; create another job"),)


class Offload(Contract):
    """What ZeRO keeps in the host's memory instead of the device's."""

    optimizer: Literal["none", "cpu"] = "none"
    """Optimizer states and the update. Needs zeroStage 1 or more."""
    parameters: Literal["none", "cpu"] = "none"
    """Parameters that are not in use. Needs zeroStage 3."""


class DeepSpeed(Contract):
    """How ZeRO spreads the training state over the workers (Rajbhandari et al. 2019, arXiv 1910.02054)."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """0 copies everything to every device, 1 splits optimizer states, 2 also gradients, 3 also parameters. Left out:
    0 for one device, 2 for LoRA, 3 for the rest."""
    offload: Offload = Field(default_factory=Offload)
    """What goes to the host's memory."""
    config: Annotated[
        dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
    ] = Field(default_factory=dict)
    """More keys of DeepSpeed's configuration file. Keys that this job sets itself are refused by name."""

    rules = (
        Rule(
            cel="self.offload.optimizer == 'none' || !has(self.zeroStage) || self.zeroStage >= 1",
            message="offload.optimizer needs zeroStage 1, 2 or 3",
            holds=lambda d: d.offload.optimizer == "none" or d.zero_stage is None or d.zero_stage >= 1,
            field="offload",
        ),
        Rule(
            cel="self.offload.parameters == 'none' || (has(self.zeroStage) && self.zeroStage == 3)",
            message="offload.parameters needs zeroStage 3",
            holds=lambda d: d.offload.parameters == "none" or d.zero_stage == 3,
            field="offload",
        ),
    )


class Workers(Contract):
    """The processes that train, in groups of equal size."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of workers (pods in a cluster, processes on a laptop)."""
    min_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Fewest that training goes on with, from a checkpoint, while others are missing. Left out: replicas."""
    resize_after_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """How long missing workers are waited for, and fewer train at least before more join them."""
    gpus: Annotated[int, Field(ge=0, le=16)] | None = None
    """GPUs of one worker; each runs one training process. 0 trains on the CPU. Left out: the runtime's, or 0."""
    cpus: Annotated[float, Field(gt=0, le=1024)] | None = None
    """CPU cores of one worker. Left out: what the runtime says, or the machine's cores shared evenly."""
    memory: Memory | None = None
    """Memory of one worker pod, such as 64Gi. Left out: the runtime's. A laptop does not limit it."""

    rules = (
        Rule(
            cel="!has(self.minReplicas) || self.minReplicas <= self.replicas",
            message="minReplicas is more than replicas, which is the most; lower it",
            holds=lambda w: w.min_replicas is None or w.min_replicas <= w.replicas,
            field="minReplicas",
        ),
    )


class Head(Contract):
    """The pod that runs the Ray cluster's head and the driver: it trains nothing."""

    cpus: Annotated[float, Field(gt=0, le=1024)] | None = None
    """CPU cores. Left out: the runtime's, or 2."""
    memory: Memory | None = None
    """Memory. Left out: the runtime's, or 8Gi."""


class Cluster(Contract):
    """What the job runs on."""

    workers: Workers = Field(default_factory=Workers)
    """The training processes."""
    head: Head = Field(default_factory=Head)
    """The pod that leads them."""
    image: ImageName | None = None
    """Container image with the trainers. Left out: the runtime's, or the operator's default."""
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$", max_length=20)] | None = None
    """Version of Ray in the image. Left out: the runtime's, or the operator's default."""
    pods: Pods = Field(default_factory=Pods)
    """What is added to every pod."""
