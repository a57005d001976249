"""A reward that is a service: answers are posted in batches, and scores come back.

    in     {"prompts": [[{"role": ..., "content": ...}, ...], ...], "completions": [...], "fields": {column: [...]}}
    out    {"scores": [...]}    a number, or null for no opinion, for each completion

What a header holds is read from the environment and told to nobody but the service.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune_api.failures import Problem
from finetune_api.problems import shorten
from finetune_api.spec import HttpReward
from finetune_trainers.data.faults import clip
from finetune_trainers.errors import UserError
from finetune_trainers.posting import NoAnswerError, Poster, variable_fault
from finetune_trainers.rewards import Episode, Scored
from finetune_trainers.rewards.functions import columns_of

__all__ = ["HttpScorer", "header_problems"]

_REQUESTS_AT_ONCE = 4


def header_problems(reward: HttpReward, path: str, environment: Mapping[str, str] = os.environ) -> list[Problem]:
    """Variables that are not there, or that hold what no header can hold. Their contents are not told."""
    faults = ((header, name, variable_fault(name, environment)) for header, name in reward.headers_from_env.items())
    return [
        Problem(path=f"{path}.headersFromEnv.{header}", value=shorten(name), message=fault)
        for header, name, fault in faults
        if fault is not None
    ]


class HttpScorer:
    """One service."""

    def __init__(self, reward: HttpReward, path: str, sleep: Callable[[float], None] = time.sleep) -> None:
        """Raises UserError when a header cannot be had."""
        problems = header_problems(reward, path)
        if problems:
            raise UserError("; ".join(map(str, problems)), problems)
        self._batch_size = reward.batch_size
        self._poster = Poster(
            reward.url,
            {header: os.environ[name] for header, name in reward.headers_from_env.items()},
            timeout_seconds=reward.timeout_seconds,
            retries=reward.retries,
            sleep=sleep,
        )
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="reward-service")

    def score(self, episodes: Sequence[Episode]) -> Scored:
        """See `Scorer`."""
        values: list[float | None] = []
        faults: dict[int, str] = {}
        size = self._batch_size
        parts = [episodes[start : start + size] for start in range(0, len(episodes), size)]
        for found in self._pool.map(self._score, parts):
            faults |= {len(values) + index: fault for index, fault in found.faults.items()}
            values += found.values
        return Scored(values, faults)

    def close(self) -> None:
        """Requests that are waited for are waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _score(self, episodes: Sequence[Episode]) -> Scored:
        body = json.dumps(
            {
                "prompts": [one.prompt for one in episodes],
                "completions": [one.completion for one in episodes],
                "fields": columns_of(episodes),
            },
            default=str,
        ).encode()
        try:
            return _read_scores(self._poster.post(body), len(episodes))
        except NoAnswerError as error:
            return Scored([None] * len(episodes), dict.fromkeys(range(len(episodes)), str(error)))


def _read_scores(body: bytes, num_episodes: int) -> Scored:
    """The scores of an answer. Raises NoAnswerError when it is none."""
    try:
        document: Any = json.loads(body)
        scores = document["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        told = clip(body[:200].decode(errors="replace"))
        raise NoAnswerError(f'the service answers {told}, and not {{"scores": [...]}}', try_again=False) from None
    if not isinstance(scores, list) or len(scores) != num_episodes:
        found = f"{len(scores)} scores" if isinstance(scores, list) else clip(json.dumps(scores))
        raise NoAnswerError(f"the service answers {found} for {num_episodes} answers", try_again=False)
    values: list[float | None] = []
    faults: dict[int, str] = {}
    for index, score in enumerate(scores):
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        values.append(float(score) if is_number else None)
        if not is_number and score is not None:
            faults[index] = f"the service answers {clip(json.dumps(score))}, which is no finite number"
    return Scored(values, faults)
