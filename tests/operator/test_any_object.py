"""No object that the API server can hold makes a decision fall over, nor a status that the API server would refuse.

500 objects in each run, 10,000 with FINETUNE_LONG=1.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from finetune_api.base import API_VERSION
from finetune_api.schema import custom_resource_definitions
from finetune_operator import names
from finetune_operator.decide import Decision, decide
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB
from finetune_operator.observe import World, observe
from finetune_operator.resources.metadata import Owner
from tests.factories import job_document
from tests.operator.crd_objects import JSON, finetune_jobs, finetune_runtimes
from tests.operator.decide_factories import NOON, SETTINGS, Document, succeeded

OBJECTS = settings(
    max_examples=10_000 if os.environ.get("FINETUNE_LONG") else 500,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
OWNER = Owner("example", "team", "uid-1")


@cache
def status_schema() -> Draft202012Validator:
    crd = custom_resource_definitions()["finetunejobs.finetune-operator.io.yaml"]
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    return Draft202012Validator(schema)


@st.composite
def jobs(draw: st.DrawFn) -> Document:
    """A drawn object, or the default job with some blocks of the drawn one: otherwise few could ever start."""
    drawn = draw(finetune_jobs())
    document: Document = job_document()
    document["metadata"] = {
        "name": "example",
        "namespace": "team",
        "uid": "uid-1",
        "generation": draw(st.integers(1, 5)),
    }
    kept = draw(st.sets(st.sampled_from(sorted(drawn["spec"])), max_size=3)) if drawn["spec"] else set()
    document["spec"] = (
        drawn["spec"] if draw(st.booleans()) else document["spec"] | {key: drawn["spec"][key] for key in kept}
    )
    if "status" in drawn:
        document["status"] = drawn["status"]
    return document


def owned(name: str, content: Document) -> Document:
    labels = names.attempt_labels("example", 1)
    metadata = {"name": name, "namespace": "team", "uid": "u", "labels": labels, "ownerReferences": [OWNER.reference()]}
    return {"metadata": metadata, **content}


RAY_JOBS = st.builds(
    owned,
    st.sampled_from(["example-1", "example-2", "example-11", "example-x", "other"]),
    st.fixed_dictionaries(
        {
            "spec": JSON | st.just({"suspend": True}),
            "status": JSON
            | st.fixed_dictionaries(
                {},
                optional={
                    "jobDeploymentStatus": st.sampled_from(["Running", "Failed", "Complete", "Suspended", "?"]),
                    "jobStatus": st.sampled_from(["RUNNING", "FAILED", "SUCCEEDED", "STOPPED"]),
                    "message": st.text(max_size=20) | st.just("exit code 5"),
                    "startTime": st.sampled_from(["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "never"]),
                    "endTime": st.sampled_from(["0001-01-01T00:00:00Z", "2026-01-01T11:00:00", "9999-12-31T23:59:59Z"]),
                },
            ),
        }
    ),
)
REPORTS = st.fixed_dictionaries(
    {"attempt": st.sampled_from(["1", "2", "x"])},
    optional={
        "progress.json": st.sampled_from(
            [
                '{"stage": "Training", "step": 3, "updatedAt": "0001-01-01T00:00:00+14:00"}',
                '{"stage": "Training", "step": 3, "updatedAt": "9999-12-31T23:59:59"}',
                '{"stage": "Training", "metrics": {"loss": 1e308}, "updatedAt": "2026-01-01T12:00:00Z"}',
                "{",
            ]
        ),
        "outcome.json": st.just(succeeded().model_dump_json(by_alias=True)) | st.just('{"result": "Failed"}'),
    },
)
CONFIG_MAPS = st.builds(
    owned,
    st.sampled_from(["example-progress", "example-runtime", "example-1-plan", "example-2-plan"]),
    st.fixed_dictionaries({"data": REPORTS | JSON}),
)
PODS = st.builds(owned, st.just("pod"), st.fixed_dictionaries({"spec": JSON, "status": JSON}))
WORLDS = st.builds(
    World,
    job=jobs(),
    runtime=st.none() | finetune_runtimes().map(lambda drawn: {"metadata": {"name": "pool"}, **drawn}),
    children=st.fixed_dictionaries(
        {RAY_JOB: st.lists(RAY_JOBS | JSON, max_size=2), CONFIG_MAP: st.lists(CONFIG_MAPS | JSON, max_size=3)}
    ),
    pods=st.lists(PODS | JSON, max_size=2),
    dependencies=st.dictionaries(st.just("sft"), st.none() | JSON | finetune_jobs(), max_size=1),
)


def decided(world: World) -> Decision:
    return decide(world.job, observe(world), NOON, SETTINGS)


def is_a_fault(decision: Decision) -> bool:
    return any(event.reason == "InternalError" for event in decision.events)


@OBJECTS
@given(world=WORLDS)
def test_any_object_gives_a_decision_and_a_status_that_stands(world: World) -> None:
    decision = decided(world)
    assert not is_a_fault(decision), decision.events
    status_schema().validate(decision.status or {})
    json.dumps([decision.status, *(one.document for one in decision.create)], allow_nan=False)
    if decision.status is not None and not (decision.create or decision.delete):
        assert_needs_no_writing_again(world, decision.status)


def assert_needs_no_writing_again(world: World, status: Document) -> None:
    written = json.loads(json.dumps(status))
    again = decided(replace(world, job=world.job | {"status": written})).status
    assert again is None, {
        name: (written.get(name), value) for name, value in again.items() if written.get(name) != value
    }


@given(spec=JSON, status=JSON, labels=JSON)
def test_even_what_no_schema_allows_is_looked_at_calmly(spec: Any, status: Any, labels: Any) -> None:
    metadata = {"name": "example", "namespace": "team", "uid": "uid-1", "labels": labels}
    decision = decided(World({"apiVersion": API_VERSION, "metadata": metadata, "spec": spec, "status": status}))
    assert not is_a_fault(decision), decision.events
