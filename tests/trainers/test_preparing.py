"""Workers on a machine that does not see what the driver has prepared."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainers.context import SingleProcessContext
from finetune_trainers.errors import DataError
from finetune_trainers.prepared import PreparedRun, PreparedSource
from finetune_trainers.preparing import prepared_here
from finetune_trainers.progress import PROGRESS_FILE
from tests.trainers.conftest import SmallWorld
from tests.trainers.factories import write_rows


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process's cache, which is not the driver's."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "elsewhere"))
    (tmp_path / "worker").mkdir()  # its log is there already
    return tmp_path / "elsewhere"


def out_of_sight(prepared: PreparedRun) -> PreparedRun:
    """With data in folders of another machine."""

    def there(sources: list[PreparedSource]) -> list[PreparedSource]:
        return [one.model_copy(update={"folder": f"/gone/{Path(one.folder).name}"}) for one in sources]

    data = prepared.data.model_copy(update={"train": there(prepared.data.train), "eval": there(prepared.data.eval)})
    return prepared.model_copy(update={"data": data})


def test_what_a_worker_sees_is_taken_as_it_is(small_world: SmallWorld, tmp_path: Path, elsewhere: Path) -> None:
    plan = small_world.plan(evaluated=True)
    prepared = small_world.prepare(plan, tmp_path / "run")
    assert prepared_here(plan, prepared, SingleProcessContext(plan, tmp_path / "run")) == prepared
    assert not elsewhere.exists()


def test_what_a_worker_does_not_see_it_makes_for_itself(
    small_world: SmallWorld, tmp_path: Path, elsewhere: Path
) -> None:
    plan = small_world.plan(evaluated=True)
    prepared = small_world.prepare(plan, tmp_path / "head")
    made = prepared_here(plan, out_of_sight(prepared), SingleProcessContext(plan, tmp_path / "worker"))
    folders = [Path(source.folder) for source in (*made.data.train, *made.data.eval)]
    assert all(folder.is_dir() and folder.is_relative_to(elsewhere) for folder in folders)
    assert [folder.name for folder in folders] == [
        Path(source.folder).name for source in (*prepared.data.train, *prepared.data.eval)
    ]
    assert (made.total_steps, made.learning_rate) == (prepared.total_steps, prepared.learning_rate)
    assert "shares none with the head" in (tmp_path / "worker" / PROGRESS_FILE).read_text()


def test_rows_that_have_changed_meanwhile_are_not_trained_on(
    small_world: SmallWorld, tmp_path: Path, elsewhere: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 20)
    plan = small_world.plan({"data.train": [{"source": f"file://{rows}"}]})
    prepared = small_world.prepare(plan, tmp_path / "head")
    write_rows(rows, 20, seed=5)
    with pytest.raises(DataError, match="has changed since the run began to read it; start the job anew"):
        prepared_here(plan, out_of_sight(prepared), SingleProcessContext(plan, tmp_path / "worker"))
