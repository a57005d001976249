"""Rewards of the tests: functions as users write them."""

from __future__ import annotations

import time

__all__ = ["knows_short_ones", "many_letters", "never_comes_back"]


def many_letters(prompts: list[str], completions: list[str], letter: str) -> list[float]:
    """The share of `letter` in each answer: something that a model of a few thousand weights can learn."""
    return [completion.count(letter) / max(len(completion), 1) for completion in completions]


def knows_short_ones(prompts: list[str], completions: list[str], longest: int) -> list[float]:
    """No number for answers to prompts of more than `longest` words."""
    return [1.0 if len(prompt.split()) <= longest else float("nan") for prompt in prompts]


def never_comes_back(completions: list[str]) -> list[float]:
    time.sleep(3600)
    return [0.0] * len(completions)
