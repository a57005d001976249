"""What was seen is sorted by what it is, and by whose it is; nothing that is seen makes it fall over."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator import names
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB, SERVICE_ACCOUNT
from finetune_operator.observe import World, observe
from finetune_operator.resources.metadata import Owner
from tests.factories import job_document
from tests.operator.crd_objects import JSON
from tests.operator.decide_factories import Document


def job(**metadata: Any) -> Document:
    return job_document() | {"metadata": {"name": "example", "namespace": "team", "uid": "uid-1"} | metadata}


def child(name: str, uid: str = "uid-1", **content: Any) -> Document:
    owner = Owner("example", "team", uid).reference()
    return {"metadata": {"name": name, "uid": f"{name}-uid", "ownerReferences": [owner]}, **content}


def test_ray_jobs_are_sorted_by_attempt() -> None:
    seen = observe(World(job(), children={RAY_JOB: [child("example-10"), child("example-2"), child("example-1")]}))
    assert list(seen.ray_jobs) == [1, 2, 10]
    assert seen.own[RAY_JOB, "example-2"] == "example-2-uid"


@pytest.mark.parametrize("name", ["example", "example-0", "example-01", "example-x", "other-1", "example-1-plan"])
def test_a_ray_job_whose_name_is_no_attempts_is_none(name: str) -> None:
    assert not observe(World(job(), children={RAY_JOB: [child(name)]})).ray_jobs


def test_a_job_whose_name_looks_like_an_attempt_of_another_keeps_its_ray_jobs_apart() -> None:
    theirs = child("example-1-1", uid="uid-of-example-1")
    seen = observe(World(job(), children={RAY_JOB: [theirs, child("example-1")]}))
    assert list(seen.ray_jobs) == [1]


def test_config_maps_are_known_by_their_names() -> None:
    snapshot, plan = child("example-runtime", data={"runtime.json": "{}"}), child("example-3-plan")
    progress = child("example-progress", data={"attempt": "3"})
    seen = observe(World(job(), children={CONFIG_MAP: [progress, snapshot, plan, child("example-3-plan-b")]}))
    assert (seen.snapshot, seen.plans, seen.report.attempt) == (snapshot, {3: plan}, 3)


@pytest.mark.parametrize(
    "owners",
    [
        pytest.param(None, id="nobody's"),
        pytest.param([Owner("example", "team", "uid-0").reference()], id="a job's of the same name that is gone"),
        pytest.param(
            [Owner("example", "team", "uid-1").reference() | {"controller": False}], id="owned, not controlled"
        ),
        pytest.param("uid-1", id="no list"),
    ],
)
def test_an_object_that_is_not_controlled_by_the_job_is_foreign(owners: Any) -> None:
    document = {"metadata": {"name": "example-1", "ownerReferences": owners}}
    seen = observe(World(job(), children={RAY_JOB: [document]}))
    assert (dict(seen.ray_jobs), set(seen.foreign)) == ({}, {(RAY_JOB, "example-1")})


def test_a_job_without_a_uid_owns_nothing() -> None:
    assert not observe(World(job(uid=""), children={RAY_JOB: [child("example-1", uid="")]})).own


def test_pods_are_sorted_by_attempt() -> None:
    pods = [{"metadata": {"name": f"p{n}", "labels": names.attempt_labels("example", n)}} for n in (1, 2, 2)]
    seen = observe(World(job(), pods=[*pods, {"metadata": {"name": "stray"}}]))
    assert {number: len(found) for number, found in seen.pods.items()} == {1: 1, 2: 2}


def test_only_kinds_that_were_looked_at_are_watched() -> None:
    assert observe(World(job(), children={RAY_JOB: []})).watched == {RAY_JOB}
    assert SERVICE_ACCOUNT not in observe(World(job())).watched


@pytest.mark.parametrize(
    ("spec", "is_ours"),
    [({}, True), ({"managedBy": "finetune-operator.io/operator"}, True), ({"managedBy": "example.com/x"}, False)],
)
def test_whose_job_it_is(spec: Document, is_ours: bool) -> None:
    assert observe(World(job() | {"spec": spec})).job.is_ours is is_ours


def test_a_report_from_outside_the_calendar_is_brought_into_it() -> None:
    text = '{"stage": "Training", "updatedAt": "0001-01-01T00:00:00+14:00"}'
    seen = observe(World(job(), children={CONFIG_MAP: [child("example-progress", data={"progress.json": text})]}))
    assert seen.report.progress is not None
    assert seen.report.progress.updated_at.year == 2000


@settings(max_examples=200)
@given(
    world=st.builds(
        World,
        job=JSON,
        runtime=JSON,
        children=st.fixed_dictionaries({RAY_JOB: st.lists(JSON), CONFIG_MAP: st.lists(JSON)}),
        pods=st.lists(JSON),
    )
)
def test_any_world_can_be_looked_at(world: World) -> None:
    observe(world)
