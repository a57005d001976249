"""Rewards of the tests: functions as users write them."""

from __future__ import annotations

import time

__all__ = ["cannot_judge_long_ones", "many_letters", "never_comes_back"]


def many_letters(prompts: list[str], completions: list[str], letter: str) -> list[float]:
    """The share of `letter` in each answer: something that a model of a few thousand weights can learn."""
    return [completion.count(letter) / max(len(completion), 1) for completion in completions]


def cannot_judge_long_ones(completions: list[str], longest: int) -> list[float]:
    """No number for answers of more than `longest` characters."""
    return [1.0 if len(completion) <= longest else float("nan") for completion in completions]


def never_comes_back(completions: list[str]) -> list[float]:
    time.sleep(3600)
    return [0.0] * len(completions)
