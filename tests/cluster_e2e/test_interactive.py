"""The sample of a Ray cluster that stays, applied with this cluster's names in it: jobs are handed to it from outside,
by its Jobs API and by Ray Client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune_api.job import Phase
from finetune_client import Client
from finetune_client.errors import NotAllowed
from tests.cluster_e2e.workbench import Workbench, workbench_in
from tests.cluster_e2e.world import CLAIM, World
from tests.factories import job_document

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def workbench(team: World) -> Iterator[Workbench]:
    with workbench_in(team) as one:
        yield one


@pytest.fixture
def job(tiny: dict[str, Any]) -> dict[str, Any]:
    spec = {key: value for key, value in tiny.items() if key != "runtimeRef"}
    return job_document(name="tried") | {"spec": {**spec, "checkpoint": {"everySteps": 20}}}


def test_who_has_no_token_is_told_where_it_belongs(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with Client(ray=f"http://{workbench.address}:8265") as client, pytest.raises(NotAllowed, match="RAY_AUTH_TOKEN"):
        client.list()


@pytest.mark.parametrize("address", ["http://{}:8265", "ray://{}:10001"], ids=["Jobs API", "Ray Client"])
def test_a_job_is_submitted_left_found_again_and_ends_with_a_model_on_the_claim(
    team: World, workbench: Workbench, job: dict[str, Any], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", workbench.token)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    where = address.format(workbench.address)
    with Client(ray=where) as first:
        first.submit(job)
    with Client(ray=where) as client:
        found = client.job("tried")
        assert [status.phase for status in found.watch()][-1] is Phase.SUCCEEDED
        assert any("checkpoint of step 40" in line.text for line in found.logs())
        (artifact,) = found.artifacts()
        folder = team.folder / artifact.uri.removeprefix(f"pvc://{CLAIM}/")
        assert (folder / "adapter_model.safetensors").stat().st_size > 0
        found.cancel()
        assert client.list() == []
