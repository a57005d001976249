"""`--set FIELD=VALUE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.problems import InvalidManifest
from finetune_client.overrides import apply_overrides, parse_override
from tests.client.conftest import JOB


def spec_with(*texts: str) -> Any:
    return apply_overrides(JOB, [parse_override(text) for text in texts])["spec"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.seed=7", 7),
        ("training.learningRate=2e-4", 0.0002),
        ("training.learningRate=auto", "auto"),
        ("training.activationCheckpointing=true", True),
        ("training.earlyStopping={patience: 2}", {"patience": 2}),
        ("spec.training.seed=7", 7),
        ("training.schedule='linear'", "linear"),
    ],
)
def test_a_value_has_the_type_that_yaml_gives_it(text: str, value: Any) -> None:
    name = text.partition("=")[0].removeprefix("spec.").removeprefix("training.")
    assert spec_with(text)["training"][name] == value


def test_the_documents_own_values_stay_as_they_are() -> None:
    spec_with("training.seed=7", "data.train.0.format=text")
    assert "seed" not in JOB["spec"]["training"]
    assert "format" not in JOB["spec"]["data"]["train"][0]


def test_blocks_on_the_way_are_made() -> None:
    assert spec_with("cluster.workers.replicas=2")["cluster"] == {"workers": {"replicas": 2}}


@pytest.mark.parametrize("text", ["data.train.0.format=text", "data.train[0].format=text"])
def test_a_list_item_is_named_by_its_index(text: str) -> None:
    assert spec_with(text)["data"]["train"][0]["format"] == "text"


def test_null_removes_a_field() -> None:
    assert "eval" not in spec_with("data.eval=null")["data"]


def test_epochs_replace_max_steps() -> None:
    assert spec_with("training.epochs=2")["training"] == {"globalBatchSize": 8, "epochs": 2}


def test_one_tuning_replaces_another() -> None:
    assert spec_with("tuning.full={}")["tuning"] == {"full": {}}


def test_a_setting_of_a_tuning_replaces_another_tuning() -> None:
    assert spec_with("tuning.freeze.train=[lm_head.*]")["tuning"] == {"freeze": {"train": ["lm_head.*"]}}


def test_both_alternatives_on_the_command_line_stay_for_validation_to_refuse() -> None:
    assert set(spec_with("training.epochs=2", "training.maxSteps=3")["training"]) >= {"epochs", "maxSteps"}


def test_a_relative_file_is_relative_to_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert spec_with("model.source=file://./model")["model"]["source"] == f"file://{tmp_path}/model"


@pytest.mark.parametrize(
    ("text", "path", "right"),
    [
        ("training.maxSteps", None, "write it as FIELD=VALUE, such as training.maxSteps=5"),
        ("=5", None, "write it as FIELD=VALUE"),
        ("training..seed=5", None, "write it as FIELD=VALUE"),
        ("data.train.3.format=text", "spec.data.train.3.format", "must be an index below 1"),
        ("data.train.x.format=text", "spec.data.train.x.format", "must be an index below 1"),
        ("model.source.name=x", "spec.model.source.name", "has no fields"),
        ("training.seed=[1", None, "is not valid YAML"),
    ],
)
def test_what_cannot_be_set_is_refused_with_its_path(text: str, path: str | None, right: str) -> None:
    with pytest.raises(InvalidManifest) as refused:
        spec_with(text)
    [problem] = refused.value.problems
    assert problem.path == path
    assert right in problem.message
    assert str(problem.file).startswith("--set")


def test_a_wrong_value_is_refused_by_validation_with_its_path(finetune: Any, write_job: Any) -> None:
    done = finetune("plan", write_job(), "--set", "training.maxStep=5")
    assert done.code == 2
    assert "spec.training.maxStep: is not a known field; did you mean maxSteps?" in done.stderr
