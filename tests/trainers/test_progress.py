"""What a run says of itself, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_api.progress import Progress, Stage
from finetune_trainers.progress import FileSink, last_report


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_part_of_a_step_is_told_with_all_that_was_reached(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    sink = FileSink(path, clock=lambda: 0.0)
    sink.report(Stage.TRAINING, step=7, total_steps=10, percent=70.0, metrics={"loss": 1.0}, message="a word")
    sink.report(Stage.TRAINING, urgent=True, phase="score", role="reward length")
    sink.report(Stage.EVALUATING, phase="generate", role="policy")
    _, scoring, evaluating = lines(path)
    assert {"step": 7, "totalSteps": 10, "percent": 70.0, "metrics": {"loss": 1.0}}.items() <= scoring.items()
    assert (scoring["phase"], scoring["role"], scoring.get("message")) == ("score", "reward length", None)
    assert (evaluating["step"], evaluating["phase"]) == (7, "generate")
    assert evaluating["percent"] == 0, "that of another stage"


def test_the_next_report_of_a_step_is_of_no_part_any_more(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    sink = FileSink(path, clock=lambda: 0.0)
    sink.report(Stage.TRAINING, step=1, phase="train", role="policy")
    sink.report(Stage.TRAINING, urgent=True, step=2)
    last = last_report(path)
    assert last is not None
    assert (last.step, last.phase, last.role) == (2, None, None)


def test_where_a_run_is_stuck_is_a_word_for_people() -> None:
    def doing(**fields: Any) -> str:
        return Progress.model_validate({"stage": "Training", "updatedAt": "2026-01-01T00:00:00Z", **fields}).doing

    assert doing() == "Training"
    assert doing(phase="sync") == "Training: sync"
    assert doing(phase="score", role="reward length") == "Training: score (reward length)"
