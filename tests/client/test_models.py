"""Where a job's model is on this machine, and what to do where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_client.errors import NoModel
from finetune_client.models import model_folder
from finetune_client.views import JobView
from tests.client.conftest import JOB
from tests.factories import with_changes


def job(*uris: str, phase: str = "Succeeded") -> JobView:
    artifacts = [{"uri": uri, "kind": "adapter", "digest": "0", "bytes": 1} for uri in uris]
    return JobView.of(with_changes(JOB, {"status": {"phase": phase, "artifacts": artifacts}}))


def test_it_is_the_first_folder_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(tmp_path))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    elsewhere = ("s3://bucket/tiny", f"file://{tmp_path}/other-machine")
    assert model_folder(job(*elsewhere, f"file://{tmp_path}")) == tmp_path
    assert model_folder(job(*elsewhere, "pvc://models/tiny")) == tmp_path / "models" / "tiny"


@pytest.mark.parametrize(
    ("view", "right"),
    [
        (job(phase="Running"), "is Running and has written no model; finetune describe tiny -n default"),
        (job("s3://bucket/tiny"), "s3://bucket/tiny, which is not on this machine; copy it here: aws s3 sync s3://"),
        (job("gs://bucket/tiny"), "gcloud storage rsync -r gs://bucket/tiny ./model"),
        (job("pvc://models/tiny"), "mount claim models here and let FINETUNE_PVC_ROOT name the folder above it"),
        (job("file:///of/another/machine"), "copy that folder here"),
    ],
    ids=["none yet", "s3", "gs", "a claim", "another machine"],
)
def test_where_there_is_none_it_is_said_how_to_get_it(view: JobView, right: str) -> None:
    with pytest.raises(NoModel) as refused:
        model_folder(view)
    assert right in str(refused.value)
