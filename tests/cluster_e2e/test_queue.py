"""Two jobs and quota for one, handed out by the real Kueue: it runs beside the nodes, as a process of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.build import files_path, program_path
from tests.cluster.kueue import kueue
from tests.cluster.nodes.cluster import Cluster
from tests.cluster.nodes.layout import HOST_ADDRESS
from tests.cluster_e2e.conftest import Say, Submit
from tests.cluster_e2e.world import World

pytestmark = pytest.mark.cluster

QUEUE = "only-one"
ONE_JOB = {"cpu": "1500m", "memory": "8Gi"}
"""A worker of one core and a head of half a one; a second such job does not fit beside it."""
PATIENT_STEPS = 5000
"""Minutes on a quick machine: the job is to be interrupted."""


@pytest.fixture(scope="module")
def queue(team: World, kuberay: Cluster, say: Say) -> Iterator[None]:
    """A queue of the team's, whose quota goes to the job of the highest priority."""
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    resources = [{"name": name, "nominalQuota": quota} for name, quota in ONE_JOB.items()]
    groups = [{"coveredResources": list(ONE_JOB), "flavors": [{"name": "any", "resources": resources}]}]
    spec = {
        "namespaceSelector": {},
        "resourceGroups": groups,
        "preemption": {"withinClusterQueue": "LowerPriority"},
    }
    documents: list[dict[str, Any]] = [
        {**version, "kind": "ResourceFlavor", "metadata": {"name": "any"}},
        {**version, "kind": "ClusterQueue", "metadata": {"name": QUEUE}, "spec": spec},
        {**version, "kind": "LocalQueue", "metadata": {"name": QUEUE}, "spec": {"clusterQueue": QUEUE}},
        {**version, "kind": "WorkloadPriorityClass", "metadata": {"name": "urgent"}, "value": 1000},
    ]
    programs = program_path("kueue", say), files_path("kueue-manifests", say)
    layout = kuberay.layout
    with kueue(*programs, kuberay.client, layout.kubeconfig, layout.root / "kueue", HOST_ADDRESS):
        team.apply(*documents)
        yield


def queued(spec: dict[str, Any], **scheduling: str) -> dict[str, Any]:
    return {**spec, "scheduling": {"queue": QUEUE, **scheduling}}


def test_the_second_job_waits_until_the_first_has_ended(
    team: World, tiny: dict[str, Any], submit: Submit, queue: None
) -> None:
    first = submit("first", queued(tiny))
    team.wait(first, lambda: team.pods(first, "worker"), "the first to be admitted")
    second = submit("second", queued(tiny))
    team.wait(second, lambda: team.phase(second) == "Queued", "the second to wait")
    team.wait(first, lambda: team.phase(first) == "Succeeded", "the first to succeed", seconds=600)
    team.wait(second, lambda: team.phase(second) == "Succeeded", "the second to succeed", seconds=600)


def test_an_urgent_job_takes_the_place_of_another_which_goes_on_afterwards(
    team: World, tiny: dict[str, Any], submit: Submit, queue: None
) -> None:
    long = {**tiny, "checkpoint": {"everySteps": 100}, "training": {**tiny["training"], "maxSteps": PATIENT_STEPS}}
    patient = submit("patient", queued(long))
    team.wait(patient, lambda: team.saved(patient) > 0, "a first checkpoint")
    urgent = submit("urgent", queued(tiny, priorityClass="urgent"))
    team.wait(patient, lambda: team.phase(patient) == "Queued", "the first to give way")
    left = team.saved(patient)
    assert left < PATIENT_STEPS
    team.wait(urgent, lambda: team.phase(urgent) == "Succeeded", "the urgent one to succeed", seconds=600)
    team.wait(patient, lambda: team.phase(patient) == "Succeeded", "the first to go on", seconds=600)
    status = team.status(patient)
    assert status["progress"]["step"] == PATIENT_STEPS
    assert len(status["attempts"]) == 1
