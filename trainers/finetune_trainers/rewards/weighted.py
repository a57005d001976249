"""Several rewards as one number. What is done about failures stands in the package's docstring."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from finetune_api.failures import Problem
from finetune_trainers.data.faults import shorten
from finetune_trainers.errors import UserError
from finetune_trainers.rewards import Episode, Scored, Scorer, Scores

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

    def __init__(self, rewards: Sequence[NamedScorer], alone: bool = True) -> None:
        """`alone`: no other rank has answers that a reward may know something of."""
        self._rewards = list(rewards)
        self._alone = alone
        num_elsewhere = sum(not reward.in_this_thread for reward in rewards)
        self._pool = ThreadPoolExecutor(max(num_elsewhere, 1), thread_name_prefix="rewards")

    def score(self, episodes: Sequence[Episode]) -> Scores:
        """See `Rewards`."""
        if not episodes:
            for reward in self._rewards:
                if reward.in_this_thread:  # other ranks may wait for this one
                    reward.scorer.score(episodes)
            return Scores([], {one.name: [] for one in self._rewards}, {one.name: 0 for one in self._rewards})
        asked = [
            None if reward.in_this_thread else self._pool.submit(reward.scorer.score, episodes)
            for reward in self._rewards
        ]
        found = [
            future.result() if future is not None else reward.scorer.score(episodes)
            for reward, future in zip(self._rewards, asked, strict=True)
        ]
        for reward, scored in zip(self._rewards, found, strict=True):
            _judge(reward, scored, episodes)
        totals = _totals([reward.weight for reward in self._rewards], found)
        if self._alone and all(map(math.isnan, totals)):
            totals = [0.0] * len(totals)
        return Scores(
            totals,
            {reward.name: scored.values for reward, scored in zip(self._rewards, found, strict=True)},
            {reward.name: len(scored.faults) for reward, scored in zip(self._rewards, found, strict=True)},
        )

    def close(self) -> None:
        """End the processes of functions. Calls that are still waited for end with them."""
        for reward in self._rewards:
            reward.scorer.close()
        self._pool.shutdown()


def _totals(weights: Sequence[float], found: Sequence[Scored]) -> list[float]:
    """The weighted sum for each episode; NaN where every reward failed."""
    counted = [_counted(scored) for scored in found]
    return [
        math.nan
        if all(index in scored.faults for scored in found)
        else sum(weight * values[index] for weight, values in zip(weights, counted, strict=True))
        for index in range(len(counted[0]))
    ]


def _counted(scored: Scored) -> list[float]:
    """What each episode gets: its score, 0 without an opinion, after a failure the mean of those that have a score."""
    known = [value for value in scored.values if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    return [
        value if value is not None else mean if index in scored.faults else 0.0
        for index, value in enumerate(scored.values)
    ]


def _judge(reward: NamedScorer, scored: Scored, episodes: Sequence[Episode]) -> None:
    """Tell of failures, each kind once; too many of them end the run."""
    if not scored.faults:
        reward.num_bad_calls = 0
        return
    index, fault = next(iter(scored.faults.items()))
    if fault not in reward.logged and len(reward.logged) < _MAX_LOGGED:
        reward.logged.add(fault)
        logger.warning(
            "Reward %s: %d of %d answers have no score: %s", reward.name, len(scored.faults), len(episodes), fault
        )
    reward.num_bad_calls = reward.num_bad_calls + 1 if 2 * len(scored.faults) > len(episodes) else 0
    if reward.num_bad_calls < MAX_BAD_CALLS:
        return
    sample = episodes[index]
    message = (
        f"gave no score to {len(scored.faults)} of {len(episodes)} answers, and to most in {MAX_BAD_CALLS} calls in a"
        f" row: {fault}; for example for the answer {shorten(sample.completion)} to"
        f" {shorten(sample.prompt[-1]['content'] if sample.prompt else '')}"
    )
    problem = Problem(path=reward.path, value=reward.name, message=message)
    raise UserError(str(problem), [problem])
