"""How far the engine that writes rollouts is from the trainer is a condition of the job, for as long as it is so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from finetune_api.progress import Progress
from finetune_operator.status import project
from finetune_trainers.rollout import Completion, OnProgress, Request, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import METHODS, OnlineWorld

pytestmark = WHEN_TRAINING

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Apart(InProcessEngine):
    """Draws from the policy, and says that every token was likelier than it was by the next of `shifts`, in nats."""

    is_policy = False
    shifts: Iterator[float]

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Completion]:
        shift = next(self.shifts)
        written = super().generate(requests, sampling, on_progress)
        return [replace(one, log_probs=[value + shift for value in one.log_probs]) for one in written]


def reports_of(shifts: Sequence[float], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """What a run says, of which another engine writes one iteration for each of `shifts`."""

    def start(
        plan: Any, model: Any, settings: Any, length: int, module: Any, end_ids: Any, context: Any, _: Any
    ) -> Any:
        engine = Apart(module, 0, end_ids, context)
        engine.shifts = iter(shifts)
        return engine

    monkeypatch.setattr("finetune_trainers.rollout.vllm_engine.start_vllm", start)
    monkeypatch.setattr("finetune_trainers.rollout.vllm_process.find_python", lambda path: path)
    online = OnlineWorld.at(folder)
    method = {"grpo": METHODS["grpo"]["grpo"] | {"vllm": {}}}
    plan = online.plan("grpo", {"method": method, "training.maxSteps": len(shifts)}, evaluated=False)
    online.train(plan, folder / "run")
    return [Progress.model_validate_json(line) for line in (folder / "run/progress.jsonl").read_text().splitlines()]


def conditions(reports: Sequence[Progress]) -> list[tuple[str, str] | None]:
    """Status and reason of RolloutFaithful after each of `reports`, as often as they change."""
    found = [
        next(
            (
                (one.status, one.reason)
                for one in project(None, report, NOON).conditions
                if one.type == "RolloutFaithful"
            ),
            None,
        )
        for report in reports
    ]
    return [key for key, _ in groupby(found)]


def test_a_gap_over_the_limit_is_a_condition_until_it_is_under_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = reports_of([0.2, 0.2, 0.0, 0.2], tmp_path, monkeypatch)
    over, within = ("False", "GapOverLimit"), ("True", "GapWithinLimit")
    assert conditions(reports) == [None, over, within, over]
    assert conditions(reports[-1:]) == [over], "the last report has it too"
    told = [report.message for report in reports if report.message and "gapLimit" in report.message]
    assert len(told) == 1, "the sentence is said once"
    assert told[0].startswith("vLLM and the trainer differ by 0.2 nats per token, and gapLimit is 0.05")


def test_a_gap_that_is_no_number_is_over_any_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = reports_of([math.inf], tmp_path, monkeypatch)
    assert conditions(reports) == [None, ("False", "GapOverLimit")]
    gap = reports[-1].rollout_gap
    assert gap is not None
    assert gap.nats is None
    assert "differ without measure" in gap.sentence
