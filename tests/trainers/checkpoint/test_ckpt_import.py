"""`finetune ckpt import`: what other programs saved becomes a checkpoint, where a person says so and nowhere else."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from typer.testing import Result

from finetune_api.spec.tuning import Lora
from finetune_client.loading import load_one
from finetune_trainers.checkpoint.exports import export_checkpoint
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.opening import open_storage
from tests.client.conftest import WriteJob, write_job
from tests.trainers.checkpoint.command import Ckpt
from tests.trainers.checkpoint.saving import start
from tests.trainers.checkpoint.trained import Training, contents

__all__ = ["write_job"]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def training() -> Training:
    made = Training()
    made.step(3)
    return made


@pytest.fixture
def safetensors(tmp_path: Path, training: Training) -> Path:
    """Weights as torch writes them without a pickle."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in training.named.items()}
    save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "st"), save_distributed=True), no_dist=True)
    return tmp_path / "st"


def document(done: Result) -> Any:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def newest(uri: str) -> Manifest:
    found = find_newest(open_storage(uri)).manifest
    assert found is not None
    return found


def exported(training: Training, folder: Path, format_name: str) -> Path:
    storage, manifest = training.save(folder / "run", 3)
    export_checkpoint(storage, manifest, str(folder / "out"), format_name)
    return folder / "out"


def test_files_without_a_pickle_are_imported_into_a_new_folder(
    ckpt: Ckpt, safetensors: Path, training: Training, tmp_path: Path
) -> None:
    found = document(ckpt("import", tmp_path / "new", "--from", safetensors, "--prefix", "model.", "-o", "json"))
    assert (found["format"], found["step"], found["numTensors"]) == ("dcp", 0, len(training.named))
    manifest = newest(f"file://{tmp_path}/new")
    assert found["id"] == str(manifest.id)
    wanted = {key: value for key, value in training.contents().items() if key[1] == "param"}
    assert contents(open_storage(f"file://{tmp_path}/new"), manifest) == wanted
    assert "job, base model, global batch were not named" in found["notes"][0]
    assert "moments begin at zero" in found["notes"][1]


@pytest.mark.parametrize("format_name", ["dcp", "deepspeed"])
def test_pickles_need_a_persons_word(ckpt: Ckpt, training: Training, tmp_path: Path, format_name: str) -> None:
    source, place = exported(training, tmp_path, format_name), tmp_path / "new"
    refused = ckpt("import", place, "--from", source)
    assert refused.exit_code == 2
    assert "--allow-pickle" in refused.stderr
    assert not place.exists(), "nothing was begun"
    found = document(ckpt("import", place, "--from", source, "--allow-pickle", "--step", "7", "-o", "json"))
    assert (found["format"], found["step"], found["numWithMoments"]) == (format_name, 7, len(training.named))
    storage = open_storage(f"file://{place}")
    assert contents(storage, newest(storage.uri)) == training.contents()


def test_what_was_imported_is_listed_and_may_be_swept_at_once(ckpt: Ckpt, safetensors: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert ckpt("import", tmp_path / "new", "--from", safetensors).exit_code == 0
    listed = document(ckpt("ls", tmp_path / "new", "-o", "json"))
    assert [row["epoch"] for row in listed["checkpoints"]] == [2, 1]
    assert listed["activity"]["atWork"] is False, "an import is no run"
    assert len(document(ckpt("gc", tmp_path / "new", "--keep-last", "1", "--yes", "-o", "json"))["deleted"]) == 1


def test_a_run_that_seems_to_be_at_work_is_left_alone(ckpt: Ckpt, safetensors: Path, tmp_path: Path) -> None:
    place = f"file://{tmp_path}/busy"
    start(open_storage(place), now=datetime.now(UTC))
    refused = ckpt("import", place, "--from", safetensors)
    assert refused.exit_code == 21
    assert "--take-over" in refused.stderr
    assert ckpt("import", place, "--from", safetensors, "--take-over").exit_code == 0


@pytest.mark.parametrize("given", ["folder", "file", "where"])
def test_the_plan_of_a_job_says_what_the_checkpoint_does_not(
    ckpt: Ckpt, safetensors: Path, write_job: WriteJob, tmp_path: Path, given: str
) -> None:
    base = f"file://{tmp_path}/nowhere"
    changes = {
        "spec.model.source": base,
        "spec.checkpoint": {},
        "spec.training.optimizer": {"weightDecay": 0.1},
        "spec.tuning": {"lora": {"rank": 4}},
    }
    plan = load_one(write_job(changes)).plan
    run = tmp_path / "runs/tiny/20260101-120000"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(plan.model_dump_json(by_alias=True))
    (run / "state.json").write_text("{}")
    ways: dict[str, list[str | Path]] = {"folder": ["--for", run], "file": ["--for", run / "plan.json"], "where": []}
    where = run if given == "where" else tmp_path / "new"
    refused = ckpt("import", where, "--from", safetensors, "--global-batch", "4", *ways[given])
    assert f"--base: no such file or folder; correct the path (found {base})" in refused.stderr
    (asked,) = ckpt.asked
    assert asked["uri"] == f"file://{where}{'/checkpoints' if given == 'where' else ''}"
    assert (asked["job"], asked["base"], asked["weightDecay"]) == ("default/tiny", base, 0.1)
    assert asked["adapter"] == Lora(rank=4).model_dump(mode="json", exclude_none=True)
    assert asked["globalBatch"] == 4, "what is said goes before what the plan says"


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["--from", "{here}/absent"], "is no folder"),
        (["--from", "{here}"], "a known format, which would hold one of dcp: .metadata"),
        (["--from", "{here}/st", "--format", "zip"], "there is no format 'zip'; use one of dcp, deepspeed"),
        (["--from", "{here}/st", "--for", "{here}/st"], "finetune plan job.yaml -o json"),
    ],
)
def test_what_cannot_be_imported_is_answered_with_what_would_be_right(
    ckpt: Ckpt, safetensors: Path, tmp_path: Path, arguments: list[str], right: str
) -> None:
    refused = ckpt("import", tmp_path / "new", *(text.format(here=tmp_path) for text in arguments))
    assert refused.exit_code == 2
    assert right in refused.stderr
    assert not (tmp_path / "new").exists()
