"""What the tests of rewards share: episodes in a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_trainers.rewards import Episode

__all__ = ["MODULE", "episodes"]

MODULE = "tests.trainers.rewards.sample_rewards"


def episodes(completions: Sequence[str], **columns: Sequence[Any]) -> list[Episode]:
    """One episode for each completion; `columns` hold a value for each."""
    return [
        Episode(
            prompt=[{"role": "user", "content": f"question {index}"}],
            completion=text,
            fields={name: column[index] for name, column in columns.items()},
            num_tokens=len(text.split()),
        )
        for index, text in enumerate(completions)
    ]
