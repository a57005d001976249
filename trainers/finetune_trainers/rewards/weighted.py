"""Several rewards as one number. What is done about failures stands in the package's docstring."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from finetune_api.failures import Problem
from finetune_trainers.data.faults import shorten
from finetune_trainers.errors import UserError
from finetune_trainers.rewards import Episode, Fault, Opinions, Scored, Scorer

__all__ = ["MAX_BAD_CALLS", "NamedScorer", "WeightedRewards"]

MAX_BAD_CALLS = 3
"""Calls in a row in which a reward may fail for more than half of the episodes."""
_MAX_LOGGED = 20
"""Different failures of one reward that are logged."""

logger = logging.getLogger(__name__)


@dataclass
class NamedScorer:
    """A reward with its place in the job."""

    name: str
    path: str
    """Its field, such as spec.method.grpo.rewards[0].function."""
    weight: float
    scorer: Scorer
    in_this_thread: bool = False
    """It computes here, as a model does; the others are waited for meanwhile."""
    num_bad_calls: int = 0
    """In a row."""
    logged: set[str] = field(default_factory=set)


class WeightedRewards:
    """The `Rewards` of a run."""

    def __init__(self, rewards: Sequence[NamedScorer], tells: bool = True) -> None:
        """`tells`: failures are logged by this rank."""
        self._rewards = list(rewards)
        self._tells = tells
        num_elsewhere = sum(not reward.in_this_thread for reward in rewards)
        self._pool = ThreadPoolExecutor(max(num_elsewhere, 1), thread_name_prefix="rewards")

    def score(self, episodes: Sequence[Episode]) -> list[Opinions]:
        """See `Rewards`."""
        if not episodes:
            for reward in self._rewards:
                if reward.in_this_thread:  # other ranks may wait for this one
                    reward.scorer.score(episodes)
            return []
        asked = [
            None if reward.in_this_thread else self._pool.submit(reward.scorer.score, episodes)
            for reward in self._rewards
        ]
        found = {
            reward.name: future.result() if future is not None else reward.scorer.score(episodes)
            for reward, future in zip(self._rewards, asked, strict=True)
        }
        return [{name: _opinion(scored, place) for name, scored in found.items()} for place in range(len(episodes))]

    def totals(self, episodes: Sequence[Episode], opinions: Sequence[Opinions]) -> list[float]:
        """See `Rewards`."""
        totals = [0.0] * len(opinions)
        for reward in self._rewards:
            said = [one[reward.name] for one in opinions]
            faults = {place: one.why for place, one in enumerate(said) if isinstance(one, Fault)}
            self._look_after(reward, faults, episodes)
            totals = [total + reward.weight * value for total, value in zip(totals, _counted(said), strict=True)]
        return [
            total if any(isinstance(value, float) for value in one.values()) else math.nan
            for one, total in zip(opinions, totals, strict=True)
        ]

    def _look_after(self, reward: NamedScorer, faults: Mapping[int, str], episodes: Sequence[Episode]) -> None:
        """Tell of failures, each kind once; too many of them end the run."""
        if not faults:
            reward.num_bad_calls = 0
            return
        place, fault = next(iter(faults.items()))
        if self._tells and fault not in reward.logged and len(reward.logged) < _MAX_LOGGED:
            reward.logged.add(fault)
            logger.warning(
                "Reward %s: %d of %d answers have no score: %s", reward.name, len(faults), len(episodes), fault
            )
        reward.num_bad_calls = reward.num_bad_calls + 1 if 2 * len(faults) > len(episodes) else 0
        if reward.num_bad_calls < MAX_BAD_CALLS:
            return
        sample = episodes[place]
        message = (
            f"gave no score to {len(faults)} of {len(episodes)} answers, and to most in {MAX_BAD_CALLS} calls in a"
            f" row: {fault}; for example for the answer {shorten(sample.completion)} to"
            f" {shorten(sample.prompt[-1]['content'] if sample.prompt else '')}"
        )
        problem = Problem(path=reward.path, value=reward.name, message=message)
        raise UserError(str(problem), [problem])

    def close(self) -> None:
        """End the processes of functions. Calls that are still waited for end with them."""
        for reward in self._rewards:
            reward.scorer.close()
        self._pool.shutdown()


def _opinion(scored: Scored, place: int) -> float | Fault | None:
    value = scored.values[place]
    if place in scored.faults:
        return Fault(scored.faults[place])
    return None if value is None else float(value)


def _counted(said: Sequence[float | Fault | None]) -> list[float]:
    """What each episode gets: its score, 0 without an opinion, after a failure the mean of those that have a score."""
    known = [value for value in said if isinstance(value, float)]
    mean = math.fsum(known) / len(known) if known else 0.0
    return [mean if isinstance(value, Fault) else value or 0.0 for value in said]
