"""What the trainers' tests share: one small world on disk, and runs in this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome
from finetune_trainers.prepared import PreparedRun
from tests.trainers.factories import tiny_model, tiny_plan, write_rows


@dataclass(frozen=True)
class SmallWorld:
    """A tiny model, rows to train and evaluate on, and a cache."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def plan(self, changes: Mapping[str, Any] | None = None, *, evaluated: bool = False) -> RunPlan:
        eval_rows = self.folder / "eval.jsonl" if evaluated else None
        return tiny_plan(self.model, self.folder / "rows.jsonl", changes, eval_rows=eval_rows)

    def prepare(self, plan: RunPlan, workdir: Path) -> PreparedRun:
        """As the launcher does before it starts workers."""
        from finetune_trainers.launch import check

        outcome = check(plan, workdir, self.cache)
        assert outcome.failure is None, outcome.failure
        return PreparedRun.model_validate_json((workdir / "prepared.json").read_bytes())

    def train(self, plan: RunPlan, workdir: Path) -> Outcome:
        """A whole run in this process, without Ray."""
        from finetune_trainers.launch import run

        return run(plan, workdir, self.cache, use_ray=False)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    folder = tmp_path_factory.mktemp("small-world")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 100)
    write_rows(folder / "eval.jsonl", 10, seed=1)
    return SmallWorld(folder)
