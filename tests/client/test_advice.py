"""What a person is told of a job that waits or has failed: why, and what to type next."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_client.advice import advice_for
from finetune_client.cli.jobs.tables import age, job_table
from finetune_client.telling import summary
from finetune_client.views import JobView
from finetune_operator.conditions import why
from finetune_operator.times import written
from tests.client.conftest import JOB
from tests.factories import with_changes

NOW = "2026-01-01T12:00:00Z"


def condition(kind: str, status: str, reason: str, message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": NOW}


def view(*conditions: dict[str, Any], phase: str = "Pending", **status: Any) -> JobView:
    """A job that the operator has looked at."""
    document = with_changes(JOB, {"metadata.namespace": "team-a", "metadata.generation": 1})
    known = {"observedGeneration": 1, "phase": phase, "conditions": list(conditions)}
    return JobView.of({**document, "status": known | status})


def hindered(reason: str, message: str) -> JobView:
    return view(condition("ClusterReady", "False", reason, message), phase="Starting")


ROWS = [
    (
        "an image that does not exist",
        hindered("ImagePullBackOff", "pod tiny-1-head waits: ImagePullBackOff"),
        "ImagePullBackOff",
        "Correct the image",
    ),
    (
        "a secret that is not there",
        hindered("CreateContainerConfigError", "pod tiny-1-head waits: CreateContainerConfigError"),
        "CreateContainerConfigError",
        "a secret or a config map, in the job's namespace",
    ),
    (
        "a claim that is not there",
        hindered("Unschedulable", 'pod a cannot be scheduled: persistentvolumeclaim "runs" not found'),
        'persistentvolumeclaim "runs" not found',
        "Create the claim",
    ),
    (
        "GPUs that nobody has",
        hindered("Unschedulable", "pod a cannot be scheduled: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu."),
        "Insufficient nvidia.com/gpu",
        "Ask for fewer or other workers",
    ),
    (
        "a pod whose volumes are not there",
        hindered("VolumesNotMounted", "pod a waits for its volumes, or for its network. It mounts Secret b"),
        "It mounts Secret b",
        "Create what is missing in the job's namespace",
    ),
    (
        "pods that a quota forbids",
        hindered("PodsNotCreated", "KubeRay cannot create the pods of RayJob a-1: exceeded quota"),
        "exceeded quota",
        "It starts by itself once that is mended",
    ),
    (
        "a container that nobody foresaw",
        hindered("CrashLoopBackOff", "pod a waits: CrashLoopBackOff"),
        "CrashLoopBackOff",
        "finetune describe",
    ),
    (
        "KubeRay that is not installed",
        view(condition("ClusterReady", "False", "KubeRayMissing", "This cluster does not know RayJobs.")),
        "does not know RayJobs",
        "It starts by itself once that is mended",
    ),
    (
        "a runtime that is not there",
        view(condition("Valid", "False", "RuntimeNotFound", "There is no FineTuneRuntime pool.")),
        "There is no FineTuneRuntime pool",
        "kubectl get finetuneruntimes",
    ),
    (
        "a job that names a model that will not do",
        view(condition("Valid", "False", "DependencyUnfit", "spec.model.source: will be an adapter")),
        "will be an adapter",
        "Correct the job that it names, and this one then starts by itself",
    ),
    (
        "a job that cannot be planned",
        view(condition("Valid", "False", "PlanRefused", "spec.training.globalBatchSize: too small")),
        "globalBatchSize",
        "finetune cancel tiny -n team-a",
    ),
    (
        "a queue that is full",
        view(condition("Admitted", "False", "Queued", "The attempt waits in queue mine."), phase="Queued"),
        "waits in queue mine",
        "kubectl get workloads shows the queue; Kueue makes no workload of a job whose scheduling.priorityClass is no",
    ),
    (
        "another job that is not done",
        view(condition("Admitted", "False", "DependencyPending", "job://base is Running.")),
        "job://base is Running",
        "starts by itself",
    ),
    (
        "a suspension",
        view(condition("Suspended", "True", "Requested", "spec.suspend is true."), phase="Suspended"),
        "spec.suspend is true",
        "finetune resume tiny -n team-a",
    ),
    ("training", view(phase="Running"), "", "finetune logs -f tiny -n team-a"),
    ("no operator", JobView.of(JOB), "No operator has looked", "kubectl get pods -A"),
    (
        "another manager",
        JobView.of(with_changes(JOB, {"spec.managedBy": "example.org/other"})),
        "example.org/other",
        "Remove spec.managedBy",
    ),
]


@pytest.mark.parametrize(("seen", "why", "following"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_job_that_waits_says_for_what_and_what_to_do(seen: JobView, why: str, following: str) -> None:
    advice = advice_for(seen)
    assert why in advice.why
    assert following in advice.next


@pytest.mark.parametrize("kind", FailureClass)
def test_every_way_to_fail_is_followed_by_something_to_do(kind: FailureClass) -> None:
    failed = condition("Failed", "True", kind, "It broke.")
    advice = advice_for(view(failed, phase="Failed", failure=kind, finishedAt=NOW))
    assert advice.why == "It broke."
    assert advice.next
    assert "{" not in advice.next


@pytest.mark.parametrize("seen", [pytest.param(row[1], id=row[0]) for row in ROWS])
def test_what_is_told_is_what_kubectl_shows(seen: JobView) -> None:
    told = why(seen.phase, seen.status.conditions)
    assert told is None or told.message == advice_for(seen).why


def test_a_cluster_that_does_not_keep_the_status_is_told_of_beside_a_job_that_runs() -> None:
    lost = condition("StatusKept", "False", "OutdatedCRD", "This cluster's CRD is older.")
    for phase in ("Starting", "Running"):
        assert advice_for(view(lost, phase=phase)).why == "This cluster's CRD is older."


def test_a_row_says_the_first_words_of_why() -> None:
    seen = hindered(
        "Unschedulable", "pod a cannot be scheduled: 0/4 nodes are available: 4 Insufficient nvidia.com/gpu, and so on"
    )
    created = seen.created_at
    assert created is None
    [_, row] = job_table([seen], JobView.of(seen.document).status.conditions[0].last_transition_time)
    assert row.startswith("tiny")
    assert row.endswith("…")
    assert summary(seen).startswith("Starting: pod a cannot be scheduled")


def test_ages_are_short() -> None:
    now = view(condition("Valid", "True", "Accepted")).status.conditions[0].last_transition_time
    assert written(now) == NOW
    assert [age(now.replace(hour=hour), now) for hour in (12, 11, 2)] == ["0s", "60m", "10h"]
    assert age(None, now) == ""


def test_a_status_that_a_newer_operator_has_written_is_read_as_far_as_it_is_known() -> None:
    document = {**JOB, "status": {"phase": "Running", "hologram": {"on": True}, "progress": {"step": 3, "mood": 1}}}
    seen = JobView.of(document)
    assert seen.status.progress is not None
    assert (seen.phase, seen.status.progress.step) == ("Running", 3)
    assert seen.document["status"]["hologram"] == {"on": True}


def test_a_job_that_was_changed_since_it_was_looked_at_is_not_settled() -> None:
    suspended = view(condition("Suspended", "True", "Requested"), phase="Suspended")
    assert suspended.is_settled
    changed = JobView.of(with_changes(suspended.document, {"metadata.generation": 2}))
    assert not changed.is_settled
