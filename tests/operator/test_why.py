"""Why a job waits or has failed stands in its status, in a word and in a line: for a column of kubectl."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from finetune_api.failures import FailureClass
from finetune_operator.refusals import KUBERAY_MISSING, refused_status
from tests.operator.decide_factories import NOON, Cluster, break_attempt, started, succeeded


def settled(cluster: Cluster) -> Cluster:
    cluster.settle()
    return cluster


def unschedulable() -> Cluster:
    cluster = settled(Cluster())
    scheduled = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: too few GPUs"}
    return settled(cluster.pod("example-1-w0", {"phase": "Pending", "conditions": [scheduled]}))


def queued() -> Cluster:
    cluster = settled(Cluster({"scheduling": {"queue": "mine"}}))
    return settled(cluster.kuberay(suspend=True, jobDeploymentStatus="Suspended"))


ROWS: list[tuple[str, Callable[[], Cluster], str, str | None, str]] = [
    ("a pod that no node takes", unschedulable, "Starting", "Unschedulable", "too few GPUs"),
    ("a runtime that is not there", lambda: settled(Cluster({"runtimeRef.name": "pool"})), "Pending", "RuntimeNotFound",
     "there is no FineTuneRuntime pool"),
    ("a failure before the next attempt", lambda: break_attempt(started()), "Pending", "BackingOff",
     "The next attempt starts at"),
    ("a mistake", lambda: break_attempt(started(), FailureClass.USER_ERROR), "Failed", "UserError", ""),
    ("a job that somebody suspended", lambda: settled(Cluster({"suspend": True})), "Suspended", "Requested",
     "set it to false to go on"),
    ("a job in its queue", queued, "Queued", None, ""),
    ("a job that starts", lambda: settled(Cluster()), "Starting", None, ""),
    ("a job that trains", started, "Running", None, ""),
    ("a job that is done", lambda: settled(started().outcome(succeeded()).ended("SUCCEEDED")), "Succeeded", None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("make", "phase", "reason", "said"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_the_reason_is_that_of_the_condition_which_tells_most(
    make: Callable[[], Cluster], phase: str, reason: str | None, said: str
) -> None:
    status = make().status
    assert (status["phase"], status.get("reason")) == (phase, reason)
    assert said in status.get("message", "")
    assert ("message" in status) == (reason is not None)


def test_the_reason_goes_when_it_holds_no_longer() -> None:
    cluster = unschedulable()
    cluster.pods.clear()
    cluster.settle()
    assert not cluster.status.keys() & {"reason", "message"}


def test_the_message_is_a_line() -> None:
    cluster = started({"failurePolicy": {"maxRestarts": 0}})
    break_attempt(cluster)
    assert cluster.status["reason"] == "MaxRestartsExceeded"
    assert "\n" in cluster.says("Failed")
    assert "\n" not in cluster.status["message"]
    assert len(cluster.status["message"]) <= 256


def test_a_refusal_of_the_cluster_is_the_reason_too() -> None:
    cluster = settled(Cluster())
    assert cluster.job is not None
    status = refused_status(None, cluster.status, KUBERAY_MISSING, cluster.job, NOON)
    assert status is not None
    assert status["reason"] == "KubeRayMissing"
    assert status["message"].startswith("This cluster does not know RayJobs.")
