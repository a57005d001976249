"""`finetune export` and `finetune chat`: which folder, which options; the trainers do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_client.cli.artifacts import find_artifact


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def whole_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_runs_folder_stands_for_its_artifact(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "artifact")
    assert find_artifact(tmp_path).option == ["--adapter", str(folder)]


def test_a_whole_model_is_told_from_an_adapter(tmp_path: Path) -> None:
    folder = whole_model(tmp_path / "model")
    assert find_artifact(folder).option == ["--model", str(folder)]


@pytest.mark.parametrize(
    ("files", "right"),
    [
        pytest.param(None, "does not exist; name a run's folder", id="absent"),
        pytest.param([], "holds neither an artifact", id="empty"),
        pytest.param(["plan.json"], "a run that has written no artifact; see its trainer.log", id="failed run"),
    ],
)
def test_a_folder_without_an_artifact_is_refused(
    finetune: Any, tmp_path: Path, files: list[str] | None, right: str
) -> None:
    folder = tmp_path / "run"
    for name in files if files is not None else []:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    if files == []:
        folder.mkdir()
    done = finetune("export", folder, "--to", tmp_path / "out")
    assert done.code == 2
    assert right in done.stderr


def test_export_passes_everything_on(finetune: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = adapter(tmp_path / "adapter")
    done = finetune("export", folder, "--to", tmp_path / "out", "--merge", "--dtype", "bf16")
    assert done.code == 0
    assert done.stdout == f"Written to {tmp_path / 'out'} (model, 2.5 kB)\n"
    asked = capfd.readouterr().err
    assert f"asked: export --adapter {folder} --to {tmp_path / 'out'} --merge --dtype bf16" in asked


def test_export_as_json_says_where_the_model_is(finetune: Any, tmp_path: Path) -> None:
    done = finetune("export", adapter(tmp_path / "adapter"), "--to", tmp_path / "out", "-o", "json")
    assert done.document == {"artifact": "file:///exported", "kind": "model", "digest": "b3", "bytes": 2500}


def test_a_whole_model_has_nothing_to_merge(finetune: Any, tmp_path: Path) -> None:
    done = finetune("export", whole_model(tmp_path / "model"), "--to", tmp_path / "out", "--merge")
    assert done.code == 2
    assert "leave --merge out" in done.stderr


def test_export_overwrites_nothing(finetune: Any, tmp_path: Path) -> None:
    out = whole_model(tmp_path / "out")
    done = finetune("export", adapter(tmp_path / "adapter"), "--to", out)
    assert done.code == 2
    assert "is not empty; name a new folder for --to" in done.stderr


def test_chat_passes_the_prompt_on(finetune: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = adapter(tmp_path / "adapter")
    assert finetune("chat", folder, "Who are you?", "--compare-base").code == 0
    assert f"asked: chat --adapter {folder} --prompt Who are you? --compare-base" in capfd.readouterr().err


def test_an_answer_as_json_is_one_object(finetune: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = finetune("chat", adapter(tmp_path / "adapter"), "?", "-o", "json")
    assert (done.code, done.document) == (0, {"prompt": "?", "tuned": "a tuned änswer", "base": None})
    assert capfd.readouterr().err.endswith("--prompt ? --max-new-tokens 128 --json\n")


def test_an_answer_that_there_is_not_is_an_object_of_nulls(finetune: Any, tmp_path: Path) -> None:
    done = finetune("chat", tmp_path / "absent", "?", "-o", "json")
    assert (done.code, done.document) == (2, {"prompt": "?", "tuned": None, "base": None})
    assert "does not exist; name a run's folder" in done.stderr
