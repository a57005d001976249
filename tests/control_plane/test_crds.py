"""The API server takes our CRDs, serves them, and can explain them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.job import Resolved
from tests.cluster.client import ApiError, Client
from tests.cluster.processes import wait_until
from tests.control_plane.conftest import JOBS, Store
from tests.factories import job_document

pytestmark = pytest.mark.control_plane

OPEN_API = "/openapi/v3/apis/finetune-operator.io/v1alpha1"
_KINDS = {f"io.finetune-operator.v1alpha1.{kind}" for kind in ("FineTuneJob", "FineTuneRuntime")}
AS_TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"


@pytest.mark.parametrize("plural", ["finetunejobs", "finetuneruntimes"])
def test_the_server_takes_the_crd_and_finds_its_schema_structural(
    stored_crds: dict[str, dict[str, Any]], plural: str
) -> None:
    # It also refuses a CRD whose rules could cost too much, so a stored one is within the budget.
    found = {condition["type"]: condition for condition in stored_crds[plural]["status"]["conditions"]}
    assert found["Established"]["status"] == "True"
    assert found["NamesAccepted"]["status"] == "True"
    assert "NonStructuralSchema" not in found


def test_every_field_of_our_group_can_be_explained(api: Client) -> None:
    wait_until(lambda: _schemas(api).keys() >= _KINDS, "the OpenAPI document of our group")
    ours = {name: schema for name, schema in _schemas(api).items() if name.startswith("io.finetune-operator")}
    silent = [path for name, schema in ours.items() for path, field in _fields(schema, name) if _is_silent(field)]
    assert not silent


def test_the_server_shows_how_far_a_job_is(api: Client, stored_job: Store) -> None:
    stored = stored_job(job_document({"scheduling.queue": "night"}, "columns"))
    resolved = Resolved(
        world_size=8,
        gpus=8,
        global_batch_size=64,
        micro_batch_size=2,
        gradient_accumulation_steps=4,
        zero_stage=3,
        precision="bf16",
    )
    status = {
        "method": "sft",
        "tuning": "lora",
        "phase": "Running",
        "resolved": resolved.to_document(),
        "restarts": 2,
        "rayJob": "columns-3",
        "progress": {"step": 120, "totalSteps": 400, "etaSeconds": 90, "metrics": {"loss": "1.25", "reward": "0.5"}},
        "checkpoint": {
            "uri": "s3://bucket/run/ckpt/1",
            "step": 100,
            "savedAt": "2026-01-01T12:00:00Z",
            "worldSize": 8,
            "bytes": 9,
        },
    }
    api.replace(f"{JOBS}/columns/status", stored | {"status": status})
    table = api.get(f"{JOBS}/columns", accept=AS_TABLE)
    shown = dict(zip((c["name"] for c in table["columnDefinitions"]), table["rows"][0]["cells"], strict=True))
    age = shown.pop("Age")
    assert age.endswith("s")
    assert shown == {
        "Name": "columns",
        "Method": "sft",
        "Tuning": "lora",
        "Phase": "Running",
        "Reason": None,
        "Step": 120,
        "Steps": 400,
        "Ckpt": 100,
        "GPUs": 8,
        "Restarts": 2,
        "Queue": "night",
        "Loss": "1.25",
        "Reward": "0.5",
        "ETA": 90,
        "RayJob": "columns-3",
        "Message": None,
    }


def test_what_few_ask_for_is_only_in_the_wide_table(api: Client) -> None:
    table = api.get(JOBS, accept=AS_TABLE)
    wide = [column["name"] for column in table["columnDefinitions"] if column["priority"] > 0]
    assert wide == ["Queue", "Loss", "Reward", "ETA", "RayJob", "Message"]


def _schemas(api: Client) -> dict[str, Any]:
    """What `kubectl explain` reads; it is written a moment after a kind is served."""
    try:
        schemas: dict[str, Any] = api.get(OPEN_API)["components"]["schemas"]
    except ApiError:
        return {}
    return schemas


def _fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property below `schema`, those of list items and of mappings' values included."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from _fields(field, f"{path}.{name}")
    for inner in ("items", "additionalProperties"):
        if isinstance(schema.get(inner), dict):
            yield from _fields(schema[inner], path)


def _is_silent(field: dict[str, Any]) -> bool:
    """No sentence of its own; Kubernetes' own types (metadata) bring theirs by reference."""
    return not field.get("description") and "$ref" not in field and "allOf" not in field
