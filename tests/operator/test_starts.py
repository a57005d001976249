"""In which order an attempt begins, and what becomes of a RayJob that still waits for its plan."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator import names
from finetune_operator.decide import decide
from finetune_operator.decision import Decision
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB, Key
from finetune_operator.observe import World, observe
from finetune_operator.settings import Settings
from finetune_operator.starts import beginning, begun, furnished, ray_job_of, stages, with_uid, withdrawn, without
from finetune_operator.views import project_ray_job
from tests.factories import job_document, runtime_document

Document = dict[str, Any]
NOW = datetime(2030, 1, 1, tzinfo=UTC)
CHILDREN: dict[Any, list[Document]] = {RAY_JOB: [], CONFIG_MAP: []}


def new_job(changes: Document | None = None, **status: Any) -> Document:
    document = job_document({"runtimeRef": {"name": "pool"}, **(changes or {})})
    document["metadata"] |= {"namespace": "team", "uid": "uid-1", "generation": 1}
    return document | ({"status": status} if status else {})


def world(job: Document | None = None) -> World:
    return World(job or new_job(), runtime_document({"storage": "pvc://runs"}), CHILDREN)


def decided(seen: World, settings: Settings | None = None) -> Decision:
    return decide(seen.job, observe(seen), NOW, settings or Settings(trainer_image="trainer:1"))


def made(seen: World) -> Document:
    """The RayJob that a pass over `seen` wants, as a watch would show it."""
    document = ray_job_of(decided(seen).create)
    assert document is not None
    stored = copy.deepcopy(document)
    stored["metadata"] |= {"uid": "ray-1", "resourceVersion": "7", "creationTimestamp": "2030-01-01T00:00:00Z"}
    return project_ray_job(stored)


def with_ray_job(seen: World, ray_job: Document, *config_maps: str) -> World:
    maps = [{"metadata": {"name": name, "namespace": "team"}} for name in config_maps]
    return World(seen.job, seen.runtime, {RAY_JOB: [ray_job], CONFIG_MAP: maps})


def test_the_ray_job_comes_with_the_copy_of_its_runtime_and_nothing_else() -> None:
    first = beginning(decided(world()).create)
    assert [(one.kind.name, one.document["metadata"]["name"]) for one in first] == [
        ("ConfigMap", "example-runtime"),
        ("RayJob", "example-1"),
    ]


def test_a_role_is_there_when_it_is_bound_and_all_else_when_the_plan_comes_and_at_last_the_ray_job() -> None:
    found = [
        [(one.kind.name, one.document["metadata"]["name"]) for one in stage]
        for stage in stages(decided(world()).create)
    ]
    assert ("Role", "example-trainer") in found[0]
    assert found[1:] == [
        [("RoleBinding", "example-trainer")],
        [("ConfigMap", "example-1-plan")],
        [("RayJob", "example-1")],
    ]
    assert stages([]) == []


def test_a_ray_job_without_its_plan_has_only_begun() -> None:
    ray_job = made(world())
    assert begun(with_ray_job(world(), ray_job)) is ray_job
    assert begun(with_ray_job(world(), ray_job, "example-progress", "example-2-plan")) is ray_job
    assert begun(world()) is None


@pytest.mark.parametrize(
    ("why", "seen"),
    [
        ("its plan is there", with_ray_job(world(), made(world()), "example-1-plan")),
        ("the status knows it", with_ray_job(world(new_job(attempts=[{"number": 1}])), made(world()))),
        ("it is of an attempt before", with_ray_job(world(new_job(attempts=[{"number": 4}])), made(world()))),
        ("it is another job's", with_ray_job(world(new_job() | {"metadata": {"name": "example"}}), made(world()))),
        ("plans are not watched", World(new_job(), None, {RAY_JOB: [made(world())]})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_ray_job_counts_when(why: str, seen: World) -> None:
    assert begun(seen) is None, why


@pytest.mark.parametrize("status", [None, 1, {"attempts": 3}, {"attempts": [None, {"number": "x"}, {}]}])
def test_whatever_the_status_holds_the_ray_job_is_found(status: Any) -> None:
    assert begun(with_ray_job(world(new_job() | {"status": status}), made(world()))) is not None


def test_the_same_ray_job_is_kept_and_the_status_knows_its_uid() -> None:
    ray_job = made(world())
    seen = with_ray_job(world(), ray_job)
    rest = furnished(decided(without(seen, ray_job)), ray_job)
    assert RAY_JOB not in {one.kind for one in rest.create}
    assert "example-1-plan" in {one.document["metadata"]["name"] for one in rest.create}
    assert rest.status is not None
    assert rest.status["attempts"][-1]["uid"] == "ray-1"
    assert rest.delete == ()


@pytest.mark.parametrize(
    "changes",
    [{"training.seed": 7}, {"cluster.workers.replicas": 2}, {"scheduling": {"queue": "team"}}],
    ids=["the plan differs", "the pods differ", "the queue differs"],
)
def test_a_ray_job_of_what_the_job_was_goes_before_anything_else_is_done(changes: Document) -> None:
    ray_job = made(world())
    later = world(new_job(changes))
    rest = furnished(decided(without(with_ray_job(later, ray_job), ray_job)), ray_job)
    assert [(one.kind, one.key, one.uid) for one in rest.delete] == [(RAY_JOB, Key("team", "example-1"), "ray-1")]
    assert (rest.create, rest.status, rest.events) == ((), None, ())
    assert rest.requeue_after is not None


def test_another_version_of_the_operator_makes_its_own_ray_job() -> None:
    ray_job = made(world())
    rest = furnished(decided(world(), Settings(trainer_image="trainer:2")), ray_job)
    assert len(rest.delete) == 1
    assert rest.status is None


def test_a_ray_job_that_is_on_its_way_out_is_waited_for_and_deleted_no_second_time() -> None:
    ray_job = made(world())
    ray_job["metadata"]["deletionTimestamp"] = "2030-01-01T00:00:01Z"
    assert withdrawn(ray_job) == ()
    rest = furnished(decided(world()), ray_job)
    assert (rest.create, rest.delete, rest.status) == ((), (), None)
    assert rest.requeue_after is not None


def test_a_job_that_is_suspended_meanwhile_loses_its_ray_job_and_says_so() -> None:
    ray_job = made(world())
    rest = furnished(decided(world(new_job({"suspend": True}))), ray_job)
    assert [one.kind for one in rest.delete] == [RAY_JOB]
    assert rest.status is not None
    assert rest.status["phase"] == "Suspended"
    assert not rest.status.get("attempts")


def test_only_a_status_with_a_new_attempt_gets_a_uid() -> None:
    assert with_uid(Decision(), {"metadata": {"uid": "x"}}) == Decision()
    assert with_uid(decided(world()), None) == decided(world())


def test_the_digest_covers_everything_that_belongs_to_the_attempt() -> None:
    document = made(world())
    assert len(document["metadata"]["annotations"][names.DIGEST_ANNOTATION]) == 16
    assert document == made(world())
    assert document != made(World(new_job(), runtime_document({"networkPolicy": False}), CHILDREN))
