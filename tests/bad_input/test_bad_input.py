"""Every mistake in a manifest, a data set or a model, by the doors that a person uses: `finetune validate --data` and
`finetune run`. Each ends before any worker starts, with an exit code, the place, the value, and what would be right.

The command is run in this process, and so are the trainers where it would start a process of theirs.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from finetune_api.plan import RunPlan
from finetune_api.progress import Progress, Stage
from finetune_client import runner
from finetune_client.cli.app import app
from finetune_trainers import launch, ray_workers, worker
from finetune_trainers.__main__ import QUIET
from finetune_trainers.__main__ import main as trainers
from tests.bad_input.data_sets import DATA_SETS
from tests.bad_input.manifests import MANIFESTS
from tests.bad_input.models import MODELS
from tests.bad_input.rows import MANIFEST, MODEL, Row
from tests.client.conftest import Finished
from tests.trainers.tiny import tiny_model, tiny_tokenizer

TABLE = [*MANIFESTS, *DATA_SETS, *MODELS]
LOOKING = {Stage.CHECKING_MODEL, Stage.PREPARING_DATA, Stage.DONE}
"""All that a run may have done."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model, whose tokenizer has no template."""
    folder = tmp_path_factory.mktemp("good") / MODEL
    tiny_model(folder, tokenizer=tiny_tokenizer(chat_template=None))
    return folder


class Door:
    """`finetune` as it is typed. A worker or a process that is started fails the test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.cache = folder / "cache"
        self.plans: list[RunPlan] = []
        """Of the jobs whose model and data were looked at."""
        self._capfd = capfd
        for name, value in {**QUIET, "FINETUNE_CACHE": str(self.cache), "FINETUNE_PVC_ROOT": "/nowhere"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        here = SimpleNamespace(run=self._trainers, DEVNULL=subprocess.DEVNULL)
        monkeypatch.setattr("finetune_client.cli.validate.subprocess", here)
        monkeypatch.setattr(subprocess, "Popen", started)
        monkeypatch.setattr(worker, "run", started)
        monkeypatch.setattr(ray_workers, "RayWorkers", started)

    def __call__(self, *typed: str | Path) -> Finished:
        result = CliRunner().invoke(app, [str(word) for word in typed], prog_name="finetune")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Finished(result.exit_code, result.stdout, result.stderr + self._capfd.readouterr().err)

    def _trainers(self, command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert tuple(command[: len(runner.TRAINERS)]) == tuple(runner.TRAINERS)
        arguments = command[len(runner.TRAINERS) :]
        self.plans.append(RunPlan.model_validate_json(Path(arguments[arguments.index("--plan") + 1]).read_bytes()))
        return subprocess.CompletedProcess(command, trainers(arguments), "", "")


def started(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("something was started")


@pytest.fixture
def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Door]:
    before = signal.getsignal(signal.SIGTERM)
    yield Door(tmp_path, monkeypatch, capfd)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.what)
def test_it_ends_before_any_worker_with_the_place_the_value_and_what_would_be_right(
    row: Row, door: Door, model: Path, tmp_path: Path
) -> None:
    if row.found_by_looking:
        shutil.copytree(model, tmp_path / MODEL)
    row.write(tmp_path)

    done = door("validate", tmp_path / MANIFEST, "--data", "-o", "json")

    assert done.code == row.code != 0
    assert set(done.document) == {"valid", "errors"}
    assert done.document["valid"] is False
    [error] = done.document["errors"]
    assert set(error) == {"file", "path", "value", "message"}
    assert (error["file"], error["path"]) == (str(tmp_path / row.file), row.path)
    assert is_shown(error["value"], row.value, tmp_path), error["value"]
    assert row.right in error["message"]
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(door.cache.glob("*/*tmp*"))
    assert bool(door.plans) is row.found_by_looking
    if row.found_by_looking:
        assert what_a_run_says(door, tmp_path) == [{**error, "file": error["file"] if row.file != MANIFEST else None}]
    else:
        refused = door("run", tmp_path / MANIFEST, "-o", "json", "--workdir", tmp_path / "run")
        assert (refused.code, refused.document["result"]) == (row.code, "Failed")
        assert refused.document["failureDetails"]["problems"] == [{k: v for k, v in error.items() if v is not None}]
        assert not (tmp_path / "run").exists()


def is_shown(value: str | None, wanted: str | None, folder: Path) -> bool:
    if value is None or wanted is None:
        return value is wanted
    value = value.replace(str(folder), ".")
    return value == wanted or (wanted.endswith("…") and value.startswith(wanted[:-1]))


def what_a_run_says(door: Door, folder: Path) -> list[dict[str, str | None]]:
    """The problems that end a run of the job which was looked at, in the process that `finetune run` starts for it."""
    outcome = launch.run(door.plans[0], folder / "run", door.cache)
    assert outcome.failure is not None
    lines = (folder / "run" / "progress.jsonl").read_text().splitlines()
    assert {Progress.model_validate_json(line).stage for line in lines} <= LOOKING
    return [
        {name: getattr(one, name) for name in ("file", "path", "value", "message")} for one in outcome.failure.problems
    ]


def test_no_two_mistakes_are_called_the_same() -> None:
    names = Counter(row.what for row in TABLE)
    assert [name for name, count in names.items() if count > 1] == []
    assert len(MANIFESTS) >= 60
    assert len(DATA_SETS) >= 40


def test_the_job_that_the_rows_change_is_valid(door: Door, model: Path, tmp_path: Path) -> None:
    """Else any row would be refused."""
    shutil.copytree(model, tmp_path / MODEL)
    good = next(row for row in DATA_SETS if row.what == "a row longer than the limit")
    good.write(tmp_path)
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text(rows[0] + "\n")
    assert json.loads(door("validate", tmp_path / MANIFEST, "--data", "-o", "json").stdout)["valid"] is True
