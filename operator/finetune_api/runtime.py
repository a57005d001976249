"""FineTuneRuntime: what a platform team says once about a pool, so that no job has to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import API_VERSION, Contract
from finetune_api.meta import Metadata
from finetune_api.spec import Head, Pods, Precision, Scheduling
from finetune_api.spec.fields import ImageName, Memory, OutputUri
from finetune_api.spec.pods import ObjectName

__all__ = ["FineTuneRuntime", "FineTuneRuntimeSpec", "RuntimeWorkers"]


class RuntimeWorkers(Contract):
    """The size of one worker on this pool."""

    gpus: Annotated[int, Field(ge=0, le=16)] = 0
    """GPUs of a worker, unless the job says otherwise."""
    cpus: Annotated[float, Field(gt=0, le=1024)] | None = None
    """CPU cores of a worker, unless the job says otherwise."""
    memory: Memory | None = None
    """Memory of a worker, unless the job says otherwise. Left out: 32Gi for each GPU, 8Gi without."""
    max_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None
    """The most workers that a job may ask for."""


class FineTuneRuntimeSpec(Contract):
    """A pool of machines and the defaults of the jobs that run on it."""

    description: Annotated[str, Field(max_length=1024)] | None = None
    """What this pool is and who may use it."""
    workers: RuntimeWorkers = Field(default_factory=RuntimeWorkers)
    """Size and number of workers."""
    head: Head = Field(default_factory=Head)
    """Size of the pod that leads the workers."""
    image: ImageName | None = None
    """Container image with the trainers, unless the job names one."""
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$", max_length=20)] | None = None
    """Version of Ray in the image."""
    gpu_resource: Annotated[str, Field(min_length=1, max_length=253)] = "nvidia.com/gpu"
    """Name under which the nodes of the pool offer their GPUs."""
    pods: Pods = Field(default_factory=Pods)
    """What is added to every pod on this pool: node labels, tolerations, NCCL settings, volumes."""
    scheduling: Scheduling = Field(default_factory=Scheduling)
    """Queue, scheduler and topology of jobs that do not say."""
    network_policy: bool = True
    """Let only the pods of the same job, and the operator of Ray, reach a job's Ray ports."""
    ray_token_auth: bool = True
    """Make Ray ask for a token that only the job's pods have. Needs Ray 2.52 or newer in the image."""
    storage: OutputUri | None = None
    """Where runs keep their files, each job in a folder of its own: pvc://claim/path or file:///path, which every pod
    sees; or s3://bucket/prefix or gs://bucket/prefix, where checkpoints and artifacts go while all else stays on each
    pod's own disk."""
    storage_secret: ObjectName | None = None
    """A Secret in the job's namespace, whose keys become environment variables of its pods: what a bucket is opened
    with, such as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL. The operator only passes
    the name on; it cannot read secrets."""
    precision: Precision = Precision.AUTO
    """Precision of jobs that leave it to `auto`."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage of jobs that do not name one."""


class FineTuneRuntime(Contract):
    """A platform's pool and defaults (cluster-scoped)."""

    api_version: Literal["finetune-operator.io/v1alpha1"] = API_VERSION
    kind: Literal["FineTuneRuntime"] = "FineTuneRuntime"
    metadata: Metadata
    spec: FineTuneRuntimeSpec
    """The pool and its defaults."""
