"""Keeps those who empty nodes politely (kubectl drain, the cluster autoscaler) from interrupting an attempt.

Losing one pod sends all workers back to the newest checkpoint, and losing the head ends the attempt, so the budget
allows no eviction of a healthy pod at all: a drain waits until the attempt has ended, or until a person suspends the
job. Preemption by the scheduler, taints and lost nodes do not ask for a budget; failurePolicy is for them.
"""

from __future__ import annotations

from finetune_operator import names
from finetune_operator.kinds import POD_DISRUPTION_BUDGET
from finetune_operator.resources.metadata import Document, Owner, child

__all__ = ["MORE_THAN_ANY_JOB_HAS", "pod_disruption_budget"]

MORE_THAN_ANY_JOB_HAS = 1026
"""Pods: the most workers that a job may have, its head, and one more."""


def pod_disruption_budget(owner: Owner) -> Document:
    """The budget over all pods of the job, of every attempt.

    maxUnavailable: 0 would say the same in other words, but Kubernetes works it out from the owner's scale
    subresource, which a RayCluster lacks: the budget would stand at SyncFailed with a warning at every change of a pod.
    A whole minAvailable needs no owner. It is above every possible number of pods, so that no resize makes it wrong.
    Pods that are not ready may be evicted: they hold up a drain and train nothing.
    """
    spec = {
        "minAvailable": MORE_THAN_ANY_JOB_HAS,
        "selector": {"matchLabels": names.job_selector(owner.name)},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return child(POD_DISRUPTION_BUDGET, owner, names.disruption_budget(owner.name), {"spec": spec})
