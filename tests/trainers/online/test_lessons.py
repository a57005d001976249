"""Rollouts from which nothing can be learned are counted, and told of while it is not too late."""

from __future__ import annotations

import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from finetune_api.progress import Lesson, Progress
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.online.method import Online
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import METHODS, REWARDS, OnlineWorld

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

SAVED = {"everySteps": 1, "keepLast": 8, "whenBehind": "wait"}
SAME = [{"metric": {"kind": "regex", "pattern": "(?s).*"}}]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("online"))


def lessons(folder: Path, step: int = 0) -> list[Lesson | None]:
    """What was told of rollouts from `step` on, whenever it changed."""
    reports = [Progress.model_validate_json(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    return [lesson for lesson, _ in groupby(report.lesson for report in reports if report.step >= step)]


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_rewards_that_tell_nothing_apart_are_a_warning_in_the_third_iteration(
    method: str, online: OnlineWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"rewards": SAME}
    settings |= {"dynamicSampling": 2} if method == "grpo" else {"passes": 1, "miniBatches": 1}
    changes = {"method": {method: METHODS[method][method] | settings}}
    two, five = (online.plan(method, changes | {"training.maxSteps": steps}, evaluated=False) for steps in (2, 5))
    with caplog.at_level(logging.WARNING):
        online.train(two, tmp_path / "two")
        outcome = online.train(five, tmp_path / "five")
    assert lessons(tmp_path / "two") == [None]
    assert lessons(tmp_path / "five") == [None, Lesson.EQUAL_REWARDS]
    assert caplog.text.count("the same reward") == 1
    figures = outcome.metrics
    assert (figures["reward"], figures["reward_std"]) == (1.0, 0.0)
    if method == "grpo":
        assert (figures["informative_groups"], figures["loss"], figures["grad_norm"]) == (0.0, 0.0, 0.0)
        assert figures["prompts_asked"] == 12, "four prompts, asked three times"


def test_a_run_that_goes_on_tells_what_an_undisturbed_one_tells(
    online: OnlineWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning is due after the third iteration: it goes on before that, and after it."""
    method = {"grpo": METHODS["grpo"]["grpo"] | {"rewards": SAME}}
    changes = {"method": method, "training.maxSteps": 4, "checkpoint": SAVED}
    plan = online.plan("grpo", changes, evaluated=False)
    assert plan.checkpoint is not None
    where = {"uri": f"file://{tmp_path}/checkpoints"}
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update=where)})
    storage = open_storage(where["uri"])
    with caplog.at_level(logging.WARNING):
        online.train(plan, tmp_path / "whole")
        for name, step in (("after", 3), ("before", 2)):
            for checkpoint, listing in listed(storage).items():
                if checkpoint.step > step:
                    storage.delete(list(listing.sizes))
            online.train(plan, tmp_path / name)
    assert lessons(tmp_path / "whole") == [None, Lesson.EQUAL_REWARDS]
    assert lessons(tmp_path / "before") == [None, Lesson.EQUAL_REWARDS]
    assert lessons(tmp_path / "after", step=3) == [Lesson.EQUAL_REWARDS]
    assert caplog.text.count("the same reward") == 2, "not again by the one that goes on after it"


def test_answers_that_never_end_are_a_warning(
    online: OnlineWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainers.online.building.end_token_ids", lambda *_: [])
    settings = METHODS["grpo"]["grpo"] | {"rewards": REWARDS}
    plan = online.plan("grpo", {"method": {"grpo": settings}, "training.maxSteps": 4}, evaluated=False)
    with caplog.at_level(logging.WARNING):
        outcome = online.train(plan, tmp_path / "run")
    assert outcome.metrics["cut_off"] == 1.0
    assert lessons(tmp_path / "run") == [None, Lesson.ALL_CUT_OFF]
    assert caplog.text.count("cut off at sampling.maxNewTokens") == 1


def test_rewards_that_differ_are_no_warning(
    online: OnlineWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Lesson | None] = []
    tell = Online._tell_of_lesson

    def follow(method: Online, figures: dict[str, float]) -> None:
        tell(method, figures | {"cut_off": 0.5})
        told.append(method._lesson)

    monkeypatch.setattr(Online, "_tell_of_lesson", follow)
    with caplog.at_level(logging.WARNING):
        online.train(online.plan("grpo", {"training.maxSteps": 2}, evaluated=False), tmp_path / "run")
    assert told == [Lesson.REWARDS_DIFFER] * 2
    assert "the same reward" not in caplog.text
