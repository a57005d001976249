"""The RayJob of one attempt, for KubeRay 1.6: a head that trains nothing, and one group of workers.

It is made once and never changed: whatever should be different is for the next attempt. Decisions in it:

- `submissionMode: HTTPMode`: KubeRay itself hands the entrypoint over. The other modes put a pod or a container in
  between that can fail, wait or be evicted on its own account while training goes on.
- `backoffLimit: 0`, and no new head for one that is lost: KubeRay would start the entrypoint again at once, uncounted
  and with no reason on record. What happens after a failure is decided in one place, by the job's failurePolicy.
- No deadline of KubeRay's: it measures them from the RayJob's own start and knows nothing of queues or of the attempts
  before. The operator ends an attempt by deleting its RayJob.
- All workers are asked for, whatever training could do with, and Ray's autoscaler is off: KubeRay makes up for a pod
  that is lost, and the driver decides with how many of them training goes on.
"""

from __future__ import annotations

from finetune_api.job import FineTuneJob
from finetune_api.plan import RunPlan
from finetune_api.runtime import FineTuneRuntimeSpec
from finetune_operator import names
from finetune_operator.kinds import RAY_JOB
from finetune_operator.resources.config_map import PLAN_KEY
from finetune_operator.resources.metadata import Document, Owner, child
from finetune_operator.resources.pods import Software, pod_template
from finetune_operator.resources.scheduling import placement
from finetune_operator.resources.sizes import head_size, worker_size
from finetune_operator.resources.storage import PLAN_FOLDER
from finetune_operator.settings import Settings

__all__ = ["ENTRYPOINT", "WORKER_GROUP", "build_rayjob"]

ENTRYPOINT = f'exec python -m finetune_trainers run --plan {PLAN_FOLDER}/{PLAN_KEY} --workdir "$FINETUNE_WORKDIR"'
"""For a shell, which gives its place to the driver. A shell that is told to end leaves the driver an orphan, whose end
nobody in a pod takes note of, and Ray then waits for it for as long as RAY_JOB_STOP_WAIT_TIME_S says."""
WORKER_GROUP = "workers"
_ONE_HEAD = "ray.io/disable-provisioned-head-restart"
_OBJECT_STORE_BYTES = 256 << 20
"""Nothing large passes through Ray's object store, which would take a third of each pod's memory otherwise."""


def build_rayjob(
    owner: Owner,
    job: FineTuneJob,
    plan: RunPlan,
    runtime: FineTuneRuntimeSpec,
    attempt: int,
    settings: Settings,
) -> Document:
    """The RayJob of attempt number `attempt`. `runtime` is the one that the plan was made with, or an empty one."""
    software = _software(job, runtime, settings)
    place = placement(job.spec.scheduling, runtime.scheduling, plan)
    common = {"object-store-memory": str(_OBJECT_STORE_BYTES)}
    head, worker = head_size(job, runtime), worker_size(job, plan, runtime)
    cluster: Document = {
        "rayVersion": software.ray_version,
        "headGroupSpec": {
            "rayStartParams": common | {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
            "template": pod_template(owner, job, plan, runtime, attempt, names.HEAD, head, software, place),
        },
        "workerGroupSpecs": [
            {
                "groupName": WORKER_GROUP,
                "replicas": plan.workers.replicas,
                "minReplicas": plan.workers.sizes[-1],
                "maxReplicas": plan.workers.replicas,
                # Said, because KubeRay would not take every pool's name for a GPU's.
                "rayStartParams": common | ({"num-gpus": str(worker.gpus)} if worker.gpus else {}),
                "template": pod_template(owner, job, plan, runtime, attempt, names.WORKER, worker, software, place),
            }
        ],
    }
    if software.asks_for_token:
        cluster["authOptions"] = {"mode": "token"}  # KubeRay makes the token, for this cluster alone
    spec: Document = {
        "submissionMode": "HTTPMode",
        "entrypoint": ENTRYPOINT,
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": job.spec.lifecycle.keep_failed_cluster_seconds,
        "rayClusterSpec": cluster,
    }
    if place.suspended:
        spec["suspend"] = True
    return child(
        RAY_JOB,
        owner,
        names.ray_job(owner.name, attempt),
        {"spec": spec},
        attempt=attempt,
        labels=place.ray_job_labels(owner, attempt),
        annotations={_ONE_HEAD: "true"},
    )


def _software(job: FineTuneJob, runtime: FineTuneRuntimeSpec, settings: Settings) -> Software:
    asked = job.spec.cluster
    return Software(
        image=asked.image or runtime.image or settings.trainer_image,
        ray_version=asked.ray_version or runtime.ray_version or settings.ray_version,
        token_auth=runtime.ray_token_auth,
    )
