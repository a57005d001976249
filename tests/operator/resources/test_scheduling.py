"""How a job is queued and placed."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import names
from finetune_operator.planning import plan_run
from finetune_operator.resources.metadata import Owner
from finetune_operator.resources.scheduling import Placement, placement
from tests.factories import job, runtime

OWNER = Owner("bot", "team", "uid-1")
TWO_WITH_GPUS = {"cluster.workers": {"replicas": 2, "gpus": 8}, "training.globalBatchSize": 32}


def placed(job_changes: dict[str, Any], runtime_changes: dict[str, Any] | None = None) -> Placement:
    asked, pool = job(job_changes), runtime(runtime_changes or {})
    return placement(asked.spec.scheduling, pool.spec.scheduling, plan_run(asked, pool))


@pytest.mark.parametrize(
    ("asked", "pool", "scheduler", "queue"),
    [
        pytest.param({}, {}, "default", None, id="nobody says"),
        pytest.param({"queue": "a"}, {}, "kueue", "a", id="a queue is Kueue's"),
        pytest.param({}, {"queue": "b"}, "kueue", "b", id="the pool's queue"),
        pytest.param({"queue": "a"}, {"queue": "b", "scheduler": "volcano"}, "volcano", "a", id="filled up"),
        pytest.param({"scheduler": "default"}, {"scheduler": "volcano"}, "default", None, id="the job wins"),
    ],
)
def test_the_jobs_scheduling_is_filled_up_from_its_pools(
    asked: dict[str, Any], pool: dict[str, Any], scheduler: str, queue: str | None
) -> None:
    place = placed({"scheduling": asked}, {"scheduling": pool})
    assert (place.scheduler, place.queue) == (scheduler, queue)


def test_only_what_kueue_releases_is_created_suspended() -> None:
    suspended = {name for name in SCHEDULERS if placed({"scheduling": {"scheduler": name, "queue": "q"}}).suspended}
    assert suspended == {"kueue"}


SCHEDULERS = ("default", "kueue", "volcano", "yunikorn")


@pytest.mark.parametrize(
    ("scheduler", "labels", "fields"),
    [
        ("default", {}, {"priorityClassName": "high"}),
        ("kueue", {"kueue.x-k8s.io/queue-name": "q", "kueue.x-k8s.io/priority-class": "high"}, {}),
        (
            "volcano",
            {"volcano.sh/queue-name": "q", "ray.io/priority-class-name": "high"},
            {"schedulerName": "volcano", "priorityClassName": "high"},
        ),
        (
            "yunikorn",
            {
                "yunikorn.apache.org/queue": "q",
                "yunikorn.apache.org/app-id": "uid-1-2",
                "ray.io/gang-scheduling-enabled": "true",
            },
            {"schedulerName": "yunikorn", "priorityClassName": "high"},
        ),
    ],
)
def test_each_scheduler_is_told_in_its_own_words(
    scheduler: str, labels: dict[str, str], fields: dict[str, str]
) -> None:
    place = placed({"scheduling": {"scheduler": scheduler, "queue": "q", "priorityClass": "high"}})
    assert place.ray_job_labels(OWNER, 2) == labels
    assert place.pod_fields() == fields


def test_kueue_without_a_queue_is_told_nothing_and_finds_its_default() -> None:
    place = placed({"scheduling": {"scheduler": "kueue"}})
    assert place.ray_job_labels(OWNER, 1) == {}
    assert place.suspended


def test_several_workers_with_gpus_stand_together_where_they_can() -> None:
    fields = placed(TWO_WITH_GPUS).worker_fields(OWNER, 1)
    [preference] = fields["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preference["podAffinityTerm"]["topologyKey"] == "topology.kubernetes.io/zone"


@pytest.mark.parametrize("changes", [{}, {"cluster.workers.gpus": 8}, {"cluster.workers.replicas": 2}])
def test_one_worker_and_workers_without_gpus_stand_anywhere(changes: dict[str, Any]) -> None:
    assert placed(changes).worker_fields(OWNER, 1) == {}


def test_what_is_packed_by_demand_starts_nowhere_else() -> None:
    topology = {"mode": "pack", "key": "rack", "required": True}
    affinity = placed({"scheduling.topology": topology}).worker_fields(OWNER, 3)["affinity"]["podAffinity"]
    assert affinity == {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "rack", "labelSelector": {"matchLabels": names.pod_labels("bot", 3, names.WORKER)}}
        ]
    }


@pytest.mark.parametrize(("required", "otherwise"), [(True, "DoNotSchedule"), (False, "ScheduleAnyway")])
def test_what_is_spread_is_spread_over_the_domains(required: bool, otherwise: str) -> None:
    fields = placed({"scheduling.topology": {"mode": "spread", "required": required}}).worker_fields(OWNER, 1)
    [constraint] = fields["topologySpreadConstraints"]
    assert (constraint["maxSkew"], constraint["whenUnsatisfiable"]) == (1, otherwise)
