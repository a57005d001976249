"""What a folder is called by others: by its claim where it lies on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainers.artifact_folder import new_folder, seal
from finetune_trainers.model_sources import local_path
from finetune_trainers.places import uri_of


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(tmp_path / "pvc"))
    return tmp_path / "pvc"


def test_a_folder_on_a_claim_is_called_by_the_claim_and_found_again(claims: Path) -> None:
    folder = claims / "shared" / "runs" / "team-a" / "artifact"
    assert uri_of(folder) == "pvc://shared/runs/team-a/artifact"
    assert local_path(uri_of(folder)) == folder


def test_any_other_folder_is_a_file(claims: Path, tmp_path: Path) -> None:
    assert uri_of(tmp_path / "runs") == (tmp_path / "runs").as_uri()
    assert uri_of(claims) == claims.as_uri()


def test_an_artifact_on_a_claim_says_which(claims: Path) -> None:
    folder = claims / "models" / "mine"
    with new_folder(folder) as unfinished:
        (unfinished / "weights").write_bytes(b"1")
        artifact = seal(unfinished, folder, "model", {})
    assert artifact.uri == "pvc://models/mine"
    assert (folder / "weights").exists()
