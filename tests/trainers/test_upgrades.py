"""A checkpoint that an older release saved is gone on from. Each release that changes what they say keeps one, with its
model and rows, so that no library's random numbers decide.

`GOLDEN=write pytest tests/trainers/test_upgrades.py` adds this release's where it is missing, and changes none.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from finetune_api.plan import RunPlan
from finetune_api.progress import Progress
from finetune_trainers.data import cache
from finetune_trainers.data.cache import CODE_VERSION
from finetune_trainers.launch import run
from tests.trainers.factories import tiny_model, tiny_plan, write_rows
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

GOLDEN = Path(__file__).parent / "checkpoint" / "golden"
THIS_RELEASE = GOLDEN / "run-1"
SETTINGS = {
    "training.microBatchSize": 2,
    "tuning": {"lora": {"rank": 2, "targetModules": ["q_proj"]}},
    "checkpoint": {"everySteps": 3, "keepLast": 1, "whenBehind": "wait"},
}


def plan(world: Path, max_steps: int) -> RunPlan:
    made = tiny_plan(world / "model", world / "rows.jsonl", SETTINGS | {"training.maxSteps": max_steps})
    assert made.checkpoint is not None
    checkpoint = made.checkpoint.model_copy(update={"uri": f"file://{world}/checkpoints"})
    return made.model_copy(update={"checkpoint": checkpoint})


def write(folder: Path, scratch: Path) -> None:
    world = scratch / "world"
    tiny_model(world / "model", layers=1, hidden_size=32, intermediate_size=32)
    write_rows(world / "rows.jsonl", 20)
    outcome = run(plan(world, 3), scratch / "run", scratch / "cache", use_ray=False)
    assert outcome.failure is None, outcome.failure
    shutil.copytree(world, folder)


@pytest.fixture(scope="session", autouse=True)
def of_this_release(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.environ.get("GOLDEN") == "write" and not THIS_RELEASE.exists():
        write(THIS_RELEASE, tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("release", sorted(one.name for one in GOLDEN.glob("run-*")) or ["run-1"])
@pytest.mark.parametrize("code_version", [CODE_VERSION, CODE_VERSION + 1])
def test_a_checkpoint_of_every_release_is_gone_on_from(
    release: str, code_version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by code that prepares data anew and comes to the same."""
    monkeypatch.setattr(cache, "CODE_VERSION", code_version)
    world = tmp_path / "world"
    shutil.copytree(GOLDEN / release, world)
    outcome = run(plan(world, 6), tmp_path / "run", tmp_path / "cache", use_ray=False)
    assert outcome.failure is None, outcome.failure
    reports = [
        Progress.model_validate_json(line) for line in (tmp_path / "run/progress.jsonl").read_text().splitlines()
    ]
    assert {report.resumed_from_step for report in reports if report.resumed_from_step is not None} == {3}
    assert not any(report.rejected_checkpoints for report in reports)
