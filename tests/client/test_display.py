"""What a person sees while a run goes on."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from finetune_api.progress import Progress, Stage
from finetune_client.cli.display import open_display
from finetune_client.telling import duration


def report(stage: Stage, **others: Any) -> Progress:
    return Progress(stage=stage, updated_at=datetime(2026, 1, 1, tzinfo=UTC), **others)


TRAINING = report(
    Stage.TRAINING,
    step=3,
    total_steps=10,
    percent=30.0,
    eta_seconds=95.0,
    tokens_per_second=12345.6,
    metrics={"loss": 1.23456, "eval_loss": 2.0},
)


def shown(*reports: Progress, terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)
    with open_display(console, quiet) as display:
        for one in reports:
            display.report(one)
        display.say("[a] sentence")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_file_gets_one_plain_line_per_report() -> None:
    preparing = report(Stage.PREPARING_DATA, percent=45.0, message="tokenizing [rows].jsonl")
    assert shown(preparing, TRAINING, terminal=False).splitlines() == [
        "Preparing data: 45 %, tokenizing [rows].jsonl",
        "Training: step 3/10, loss 1.2346, 12,346 tokens/s, 1:35 left, eval loss 2.0000",
        "[a] sentence",
    ]


def test_of_a_method_that_learns_from_rewards_reward_and_kl_are_shown_and_not_its_loss() -> None:
    metrics = {"loss": 1e-7, "reward": 0.5, "kl": 0.012, "eval_loss": -0.75, "eval_reward": 0.75}
    [line, _] = shown(TRAINING.model_copy(update={"metrics": metrics}), terminal=False).splitlines()
    assert line == ("Training: step 3/10, reward 0.5000, kl 0.0120, 12,346 tokens/s, 1:35 left, eval reward 0.7500")


def test_of_judged_answers_the_share_that_the_model_gets_right_stands_beside_the_loss() -> None:
    judged = TRAINING.model_copy(update={"metrics": {"loss": 0.6, "rewards/accuracies": 0.75, "rewards/margins": 1.0}})
    assert "step 3/10, loss 0.6000, accuracy 0.7500, " in shown(judged, terminal=False)


def test_the_parts_of_a_step_are_no_lines_but_for_what_they_say_and_a_terminal_shows_who_is_at_work() -> None:
    scoring = TRAINING.model_copy(update={"phase": "score", "role": "reward length"})
    writing = TRAINING.model_copy(update={"phase": "generate", "role": "policy", "message": "writing: 3 of 8"})
    assert len(shown(TRAINING, scoring, writing, writing, scoring, terminal=False).splitlines()) == 3
    assert "score (reward length)" in shown(scoring, terminal=True)


def test_a_terminal_shows_the_stage_and_the_training_with_its_figures() -> None:
    text = shown(TRAINING, report(Stage.EVALUATING, step=3, total_steps=10, percent=50.0), terminal=True)
    assert "Evaluating" in text
    assert "50 %" in text
    assert "3/10" in text
    assert "[a] sentence" in text


def test_quiet_shows_only_what_we_say() -> None:
    assert shown(TRAINING, terminal=True, quiet=True) == "[a] sentence\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (187, "3:07"), (3725, "1:02:05")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
