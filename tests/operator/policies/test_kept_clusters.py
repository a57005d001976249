"""`keepFailedClusterSeconds` keeps what failed, and only that: KubeRay's own time to live knows no difference."""

from __future__ import annotations

from typing import Any

from finetune_api.failures import FailureClass
from finetune_api.progress import Outcome, Result, Stage
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB
from tests.operator.decide_factories import Cluster, failed, succeeded

KEPT = {"lifecycle": {"keepFailedClusterSeconds": 3600}, "failurePolicy": {"maxRestarts": 0}}


def ended(changes: dict[str, Any], outcome: Outcome) -> Cluster:
    cluster = Cluster(changes)
    cluster.settle()
    cluster.kuberay(jobDeploymentStatus="Running", jobStatus="RUNNING")
    cluster.report(Stage.TRAINING, 3).settle()
    cluster.outcome(outcome).ended("SUCCEEDED" if outcome.result is Result.SUCCEEDED else "FAILED")
    cluster.settle()
    return cluster


def test_the_cluster_of_a_job_that_succeeded_is_not_kept() -> None:
    cluster = ended(KEPT, succeeded())
    assert cluster.status["phase"] == "Succeeded"
    assert cluster.named(RAY_JOB) == []
    assert "example-1-plan" in cluster.named(CONFIG_MAP)


def test_the_cluster_of_a_job_that_failed_is_kept() -> None:
    cluster = ended(KEPT, failed(FailureClass.STORAGE_ERROR))
    assert cluster.status["phase"] == "Failed"
    assert cluster.named(RAY_JOB) == ["example-1"]


def test_where_nothing_is_to_be_kept_kuberay_ends_the_cluster_and_the_ray_job_stays_to_be_looked_at() -> None:
    cluster = ended({}, succeeded())
    assert cluster.named(RAY_JOB) == ["example-1"]
