"""A step's figures as a line of the log, and read back out of what else a log holds."""

from __future__ import annotations

import math

import pytest

from finetune_api.figures import figures_in, line_of


def logged(step: int, **figures: float) -> str:
    return f"2026-01-31 10:15:02,123 worker 0 INFO {line_of(step, figures)}"


def test_figures_come_back_as_they_were_written() -> None:
    assert figures_in(logged(20, loss=1.84, learning_rate=2e-4)) == (20, {"loss": 1.84, "learning_rate": 2e-4})
    assert figures_in(logged(0, num_tokens=81920.0)) == (0, {"num_tokens": 81920.0})


def test_six_digits_are_kept() -> None:
    assert line_of(3, {"loss": 1.23456789}) == 'step 3: {"loss": 1.23457}'


def test_a_figure_that_is_no_finite_number_comes_back_as_what_it_is() -> None:
    found = figures_in(logged(1, loss=math.nan, grad_norm=math.inf))
    assert found is not None
    assert math.isnan(found[1]["loss"])
    assert found[1]["grad_norm"] == math.inf


@pytest.mark.parametrize(
    "line",
    [
        "2026-01-31 10:15:02,123 worker 0 INFO checkpoint of step 20: training stood still for 0.012 s",
        'the model says step 3: {"loss": "low"}',
        'the model says step 3: {"loss": {"a": 1.0}}',
        "the model says step 3: {loss}",
        'a dict from step 3: {"loss": 1.0} and more',
        "",
    ],
)
def test_what_else_a_log_holds_are_no_figures(line: str) -> None:
    assert figures_in(line) is None
