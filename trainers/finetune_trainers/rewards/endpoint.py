"""A reward that is a service: answers are posted in batches, and scores come back.

    in     {"prompts": [[{"role": ..., "content": ...}, ...], ...], "completions": [...], "fields": {column: [...]}}
    out    {"scores": [...]}    a number, or null for no opinion, for each completion

What a header holds is read from the environment and told to nobody but the service. Redirects are not followed: they
would take it along.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message as Headers
from typing import IO, Any

from finetune_api.failures import Problem
from finetune_api.problems import shorten
from finetune_api.spec import HttpReward
from finetune_trainers.data.faults import clip
from finetune_trainers.errors import UserError, first_line
from finetune_trainers.rewards import Episode, Scored
from finetune_trainers.rewards.functions import columns_of

__all__ = ["HttpScorer", "header_problems"]

_REQUESTS_AT_ONCE = 4
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
_MAX_BYTES = 64 << 20
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


def header_problems(reward: HttpReward, path: str, environment: Mapping[str, str] = os.environ) -> list[Problem]:
    """Variables that are not there, or that hold what no header can hold. Their contents are not told."""
    problems = []
    for header, name in reward.headers_from_env.items():
        value = environment.get(name)
        if value is None:
            message = f"the environment variable {name} is not set; set it, in a cluster by cluster.pods.env"
        elif not value.strip() or not value.isascii() or not value.isprintable():
            message = f"the environment variable {name} holds what no header can hold; it must be one line of ASCII"
        else:
            continue
        problems.append(Problem(path=f"{path}.headersFromEnv.{header}", value=shorten(name), message=message))
    return problems


class HttpScorer:
    """One service."""

    def __init__(self, reward: HttpReward, path: str, sleep: Callable[[float], None] = time.sleep) -> None:
        """Raises UserError when a header cannot be had."""
        problems = header_problems(reward, path)
        if problems:
            raise UserError("; ".join(map(str, problems)), problems)
        self._reward = reward
        self._sleep = sleep
        self._headers = {header: os.environ[name] for header, name in reward.headers_from_env.items()}
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._pool = ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="reward-service")

    def score(self, episodes: Sequence[Episode]) -> Scored:
        """See `Scorer`."""
        values: list[float | None] = []
        faults: dict[int, str] = {}
        size = self._reward.batch_size
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
            return _read_scores(self._post(body), len(episodes))
        except _NoAnswerError as error:
            return Scored([None] * len(episodes), dict.fromkeys(range(len(episodes)), str(error)))

    def _post(self, body: bytes) -> bytes:
        """The service's answer. Raises _NoAnswerError after the last attempt."""
        wait = _FIRST_WAIT_SECONDS
        for attempt in range(self._reward.retries + 1):
            try:
                return self._post_once(body)
            except _NoAnswerError as error:
                if not error.try_again or attempt == self._reward.retries:
                    raise
                self._sleep(min(max(wait, error.after_seconds), _LONGEST_WAIT_SECONDS))
                wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _post_once(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"} | self._headers
        request = urllib.request.Request(self._reward.url, data=body, headers=headers, method="POST")
        deadline = time.monotonic() + self._reward.timeout_seconds
        try:
            with self._opener.open(request, timeout=self._reward.timeout_seconds) as response:
                return _read(response, deadline, self._reward.timeout_seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
        except TimeoutError:
            raise _NoAnswerError(f"the service took longer than {self._reward.timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:  # URLError among them
            reason = getattr(error, "reason", error)
            told = first_line(reason) if isinstance(reason, Exception) else str(reason)
            raise _NoAnswerError(f"the service cannot be reached: {type(reason).__name__}: {told}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> None:
        return None


class _NoAnswerError(Exception):
    """An attempt that gave no scores."""

    def __init__(self, message: str, try_again: bool = True, after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.try_again = try_again
        self.after_seconds = after_seconds


def _refusal(error: urllib.error.HTTPError) -> _NoAnswerError:
    after = error.headers.get("Retry-After", "")
    seconds = float(after) if after.isdecimal() else 0.0
    if 300 <= error.code < 400:
        return _NoAnswerError(
            f"the service answers {error.code} with another place, which is not gone to; name that", False
        )
    try:
        said = error.read(1000).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        said = ""
    more = f": {clip(said)}" if said else ""
    return _NoAnswerError(f"the service answers {error.code} {error.reason}{more}", error.code in _TRY_AGAIN, seconds)


def _read(response: http.client.HTTPResponse, deadline: float, seconds: float) -> bytes:
    """The whole body; a socket's own timeout is for each piece of it."""
    body = bytearray()
    while piece := response.read1(1 << 16):
        body += piece
        if len(body) > _MAX_BYTES:
            raise _NoAnswerError(f"the service answers more than {_MAX_BYTES >> 20} MiB", try_again=False)
        if time.monotonic() > deadline:
            raise _NoAnswerError(f"the service took longer than {seconds:g} s")
    return bytes(body)


def _read_scores(body: bytes, num_episodes: int) -> Scored:
    """The scores of an answer. Raises _NoAnswerError when it is none."""
    try:
        document: Any = json.loads(body)
        scores = document["scores"]
    except (ValueError, KeyError, TypeError, RecursionError):
        told = clip(body[:200].decode(errors="replace"))
        raise _NoAnswerError(f'the service answers {told}, and not {{"scores": [...]}}', try_again=False) from None
    if not isinstance(scores, list) or len(scores) != num_episodes:
        found = f"{len(scores)} scores" if isinstance(scores, list) else clip(json.dumps(scores))
        raise _NoAnswerError(f"the service answers {found} for {num_episodes} answers", try_again=False)
    values: list[float | None] = []
    faults: dict[int, str] = {}
    for index, score in enumerate(scores):
        is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        values.append(float(score) if is_number else None)
        if not is_number and score is not None:
            faults[index] = f"the service answers {clip(json.dumps(score))}, which is no finite number"
    return Scored(values, faults)
