"""What a running job stands on cannot be changed under it; what may grow or shrink can."""

from __future__ import annotations

import pytest

from tests.cluster.client import ApiError, Client
from tests.control_plane.conftest import JOBS, Store
from tests.control_plane.rules import UPDATE_ROWS, UpdateRow
from tests.factories import job_document

pytestmark = pytest.mark.control_plane


@pytest.mark.parametrize("row", UPDATE_ROWS, ids=str)
def test_a_change_is_refused_with_our_message(api: Client, stored_job: Store, row: UpdateRow) -> None:
    stored_job(job_document(row.before, "fixed"))
    with pytest.raises(ApiError) as refused:
        api.merge(f"{JOBS}/fixed?fieldValidation=Strict", {"spec": row.change})
    assert refused.value.code == 422
    assert [(field, row.message in text) for field, text in refused.value.causes] == [(row.path, True)]


def test_the_number_of_workers_may_change_while_the_job_is_suspended(api: Client, stored_job: Store) -> None:
    stored_job(job_document({"suspend": True}, "grows"))
    changed = api.merge(f"{JOBS}/grows", {"spec": {"cluster": {"workers": {"replicas": 4}}}})
    assert changed["spec"]["cluster"]["workers"]["replicas"] == 4
    assert changed["metadata"]["generation"] == 2


def test_applying_the_same_job_again_changes_nothing(api: Client, stored_job: Store) -> None:
    stored = stored_job(job_document({"runtimeRef.name": "pool"}, "again"))
    again = api.merge(f"{JOBS}/again", {"spec": job_document({"runtimeRef.name": "pool"})["spec"]})
    assert again["metadata"]["resourceVersion"] == stored["metadata"]["resourceVersion"]
