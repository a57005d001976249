"""Rewards that compare an answer with the right one in the data. Pure functions on texts, 0 to 1 each.

A pattern is somebody's regular expression on the model's texts, which may take longer than anybody lives: metrics with
one are run by `functions`, in a process that can be ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from finetune_api.problems import shorten
from finetune_api.spec import FunctionReward, MetricReward
from finetune_trainers.generation_metrics import exact_match, token_f1
from finetune_trainers.rewards import Episode, Scored
from finetune_trainers.rewards.functions import FunctionScorer, of_rows_with

__all__ = [
    "DEFAULT_COLUMN",
    "PATTERN_SECONDS",
    "MetricScorer",
    "column_of",
    "last_number",
    "rouge_l",
    "score_texts",
    "sentence_bleu",
]

DEFAULT_COLUMN = "answer"
PATTERN_SECONDS = 60.0
"""For the answers of one batch."""
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212])?"  # a sign, and not what stands between two numbers
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][+-]?\d{1,3}(?!\d))?"
)
_WORD = re.compile(r"\w+")


def column_of(reward: MetricReward) -> str | None:
    """The column that `reward` compares with, None where it compares with none."""
    return None if reward.kind == "regex" else reward.column or DEFAULT_COLUMN


class MetricScorer:
    """One metric."""

    def __init__(self, reward: MetricReward, path: str) -> None:
        """`path`: where `reward` stands in the job."""
        self._kind = reward.kind
        self._column = reward.column or DEFAULT_COLUMN
        self._needs = [] if (column := column_of(reward)) is None else [column]
        self._apart = None
        if reward.pattern is not None:
            settings = {"kind": reward.kind, "pattern": reward.pattern, "column": self._column}
            function = f"{__name__}:score_texts"
            call = FunctionReward(call=function, settings=settings, timeout_seconds=PATTERN_SECONDS)
            self._apart = FunctionScorer(call, path)

    def score(self, episodes: Sequence[Episode]) -> Scored:
        """See `Scorer`."""
        return of_rows_with(self._needs, episodes, self._score if self._apart is None else self._apart.score)

    def _score(self, episodes: Sequence[Episode]) -> Scored:
        values: list[float | None] = []
        faults: dict[int, str] = {}
        for index, episode in enumerate(episodes):
            try:
                answers = episode.fields[self._column]
                values.append(_nearest(self._kind, episode.completion, answers, self._column))
            except ValueError as error:
                values.append(None)
                faults[index] = str(error)
        return Scored(values, faults)

    def close(self) -> None:
        if self._apart is not None:
            self._apart.close()


def score_texts(completions: list[str], kind: str, pattern: str, column: str, **columns: list[Any]) -> list[float]:
    """The metric `kind` of what `pattern` takes of each completion. Called as a reward function."""
    expression = re.compile(pattern)
    if kind == "regex":
        return [float(expression.search(text) is not None) for text in completions]
    taken = [_last_match(expression, text) for text in completions]
    return [
        0.0 if text is None else _nearest(kind, text, answers, column)
        for text, answers in zip(taken, columns[column], strict=True)
    ]


def _last_match(expression: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in expression.finditer(text):
        found = match
    if found is None:
        return None
    return (found[1] or "") if expression.groups else found[0]


def _nearest(kind: str, text: str, answers: Any, column: str) -> float:
    """The best over the right answers. Raises ValueError when there is none."""
    listed = answers if isinstance(answers, list) else [answers]
    if not listed or any(isinstance(one, list | dict) or one is None for one in listed):
        raise ValueError(f"the row has no right answer in column {column}")
    return max(_METRICS[kind](text, str(one)) for one in listed)


def _same_number(text: str, answer: str) -> float:
    right = last_number(answer)
    if right is None:
        raise ValueError(f"the right answer {shorten(answer)} has no number")
    return float(last_number(text) == right)


def last_number(text: str) -> Decimal | None:
    """The last number in `text`, commas between thousands left out; None without one. 1/2 ends with 2."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match[0]
    return None if found is None else Decimal(found.replace(",", "").replace("\u2212", "-"))


def rouge_l(text: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, W04-1013), in lower case and without punctuation. Two
    texts without words agree: 1."""
    words, right = (_WORD.findall(one.lower()) for one in (text, answer))
    if not words or not right:
        return float(words == right)
    return 2 * _common_length(words, right) / (len(words) + len(right))


def _common_length(words: Sequence[str], others: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as the bits of a number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << index
    everywhere = (1 << len(words)) - 1
    row = everywhere
    for word in others:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(words) - row.bit_count()


def sentence_bleu(text: str, answer: str) -> float:
    """BLEU of one sentence as sacrebleu has it (13a tokens, exponential smoothing, no longer n-grams than there are),
    0 to 1."""
    import sacrebleu

    return min(sacrebleu.sentence_bleu(text, [answer], use_effective_order=True).score / 100, 1.0)


_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact-match": lambda text, answer: float(exact_match(text, answer)),
    "numeric-answer": _same_number,
    "token-f1": token_f1,
    "rouge-l": rouge_l,
    "bleu": sentence_bleu,
}
