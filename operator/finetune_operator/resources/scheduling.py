"""How a job is queued, admitted and placed: the job's choices over its runtime's, in the words of each scheduler.

kueue      labels on the RayJob, which is created suspended and which Kueue releases; nothing else is ever written to it
volcano    labels that KubeRay turns into a PodGroup of all pods
yunikorn   labels that KubeRay turns into one application with task groups
default    nobody waits for all pods together: some may start while others find no room

KubeRay must have been told about Volcano or YuniKorn (its batchScheduler setting); Kueue needs nothing of it. Kueue
admits all pods or none by quota, the other two when all of them fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune_api.plan import RunPlan
from finetune_api.spec import Scheduling, Topology
from finetune_operator import names
from finetune_operator.resources.metadata import Document, Owner

__all__ = ["Placement", "placement"]

_KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
_KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
_VOLCANO_QUEUE = "volcano.sh/queue-name"
_VOLCANO_PRIORITY = "ray.io/priority-class-name"
_YUNIKORN_QUEUE = "yunikorn.apache.org/queue"
_YUNIKORN_APPLICATION = "yunikorn.apache.org/app-id"
_GANG = "ray.io/gang-scheduling-enabled"

_PREFERENCE = 100
"""The heaviest weight there is: no other preference of the pod stands against it."""
_NEAR_EACH_OTHER = Topology(mode="pack")
"""For several workers with GPUs that say nothing: a collective is as fast as its slowest link."""


@dataclass(frozen=True)
class Placement:
    """Who schedules the job, and where its pods go."""

    scheduler: Literal["default", "kueue", "volcano", "yunikorn"]
    queue: str | None
    priority_class: str | None
    topology: Topology | None

    @property
    def suspended(self) -> bool:
        """Is the RayJob created suspended? Kueue releases it; whoever else wrote to spec.suspend would fight it."""
        return self.scheduler == "kueue"

    def ray_job_labels(self, owner: Owner, attempt: int) -> dict[str, str]:
        """On the RayJob, whence KubeRay copies them to the RayCluster and its pods."""
        wanted: dict[str, str | None] = {}
        if self.scheduler == "kueue":
            wanted = {_KUEUE_QUEUE: self.queue, _KUEUE_PRIORITY: self.priority_class}
        elif self.scheduler == "volcano":
            wanted = {_VOLCANO_QUEUE: self.queue, _VOLCANO_PRIORITY: self.priority_class}
        elif self.scheduler == "yunikorn":
            # One application for each attempt, and no two of one name in the whole cluster.
            application = f"{owner.uid}-{attempt}"
            wanted = {_YUNIKORN_QUEUE: self.queue, _YUNIKORN_APPLICATION: application, _GANG: "true"}
        return {key: value for key, value in wanted.items() if value is not None}

    def pod_fields(self) -> Document:
        """What every pod's spec says of its scheduling.

        Kueue's priority is that of the workload in the queue, and none of the pods'. The scheduler's name stands there
        although KubeRay writes it too: without it a KubeRay that was not told would start the pods one by one.
        """
        fields: Document = {}
        if self.scheduler in ("volcano", "yunikorn"):
            fields["schedulerName"] = self.scheduler
        if self.priority_class is not None and self.scheduler != "kueue":
            fields["priorityClassName"] = self.priority_class
        return fields

    def worker_fields(self, owner: Owner, attempt: int) -> Document:
        """What the workers' spec says of their places. Only workers of the same attempt are looked at: those of the
        attempt before may still be on their way out somewhere else."""
        if self.topology is None:
            return {}
        topology = self.topology
        selector = {"matchLabels": names.pod_labels(owner.name, attempt, names.WORKER)}
        if topology.mode == "spread":
            constraint = {
                "maxSkew": 1,
                "topologyKey": topology.key,
                "whenUnsatisfiable": "DoNotSchedule" if topology.required else "ScheduleAnyway",
                "labelSelector": selector,
            }
            return {"topologySpreadConstraints": [constraint]}
        term = {"topologyKey": topology.key, "labelSelector": selector}
        if topology.required:
            return {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}
        preference = {"weight": _PREFERENCE, "podAffinityTerm": term}
        return {"affinity": {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preference]}}}


def placement(job: Scheduling, runtime: Scheduling, plan: RunPlan) -> Placement:
    """The job's `scheduling`, filled up from its runtime's and by defaults."""
    queue = job.queue or runtime.queue
    topology = job.topology or runtime.topology
    if topology is None and plan.workers.replicas > 1 and plan.workers.gpus:
        topology = _NEAR_EACH_OTHER
    return Placement(
        scheduler=job.scheduler or runtime.scheduler or ("kueue" if queue else "default"),
        queue=queue,
        priority_class=job.priority_class or runtime.priority_class,
        topology=topology,
    )
