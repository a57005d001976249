"""What answers of the model are worth. Called by the methods that learn from their own answers.

    building    the rewards of a plan, checked by the launcher and made on each worker
    weighted    several rewards as one number
    functions   a Python function, in a process of its own (`function_process`)
    metrics     a comparison with the answer in the data
    endpoint    a service
    judge       a reward model

A reward that fails for an answer does not end the run. The answer has no score by that reward's name, and the failure
is counted. In the total the mean of that reward over the other answers stands in its place, where another reward could
score the answer; where none could, the total is NaN, and the answer is left out or taken as an average one by whoever
learns. So whoever makes a reward fail wins nothing by it. A reward may also have no opinion: then it adds nothing, and
could not score. It has none of an answer whose row lacks a column that it cannot do without.
Each rank asks about its own answers; what follows is decided of those of all ranks, so it is the same for any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

__all__ = ["Episode", "Fault", "Message", "Opinions", "Rewards", "Scored", "Scorer"]

Message = dict[str, str]
"""`role` and `content`."""


@dataclass(frozen=True)
class Episode:
    """A prompt, and what the model answered."""

    prompt: list[Message]
    completion: str
    """Decoded, special tokens left out."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, such as answer."""
    num_tokens: int = 0
    """Of the completion."""
    ended: bool = True
    """False: it was cut off."""


@dataclass(frozen=True)
class Fault:
    """In the place of a score: the reward failed."""

    why: str


Opinions = dict[str, float | Fault | None]
"""What each reward says of an episode, by its name: finite, or None where it has no opinion."""


class Rewards(Protocol):
    """All rewards of a run."""

    def score(self, episodes: Sequence[Episode]) -> list[Opinions]:
        """Of this rank's own episodes, possibly none; only with a reward model that is part of a split policy do ranks
        wait for one another. Raises UserError when a reward cannot be had."""
        ...

    def totals(self, episodes: Sequence[Episode], opinions: Sequence[Opinions]) -> list[float]:
        """The sum of the rewards, each times its weight; NaN where every reward failed.

        Given the episodes of all ranks, in the same order on each, and so with the same result on each. Raises
        UserError when a reward has failed too often.
        """
        ...

    def close(self) -> None: ...


class Scored(NamedTuple):
    """What one reward says of some episodes, in their order."""

    values: list[float | None]
    """Finite, or None where it failed or had no opinion."""
    faults: dict[int, str]
    """Why it failed, by the episode's place."""


class Scorer(Protocol):
    """One reward."""

    def score(self, episodes: Sequence[Episode]) -> Scored:
        """Raises UserError when it could score no episode whatsoever."""
        ...

    def close(self) -> None: ...
