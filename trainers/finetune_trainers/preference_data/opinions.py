"""From judgements to what methods learn from: pairs of a better and a worse answer, or answers that are good or bad.

Pure; called by `importing` and `judging`. An answer is the assistant's message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from finetune_api.preference_data import Pairing
from finetune_trainers.data.turns import Message
from finetune_trainers.preference_data.reading import as_written

__all__ = [
    "Label",
    "Pair",
    "Scored",
    "key_of",
    "label_row",
    "labels_of_pairs",
    "labels_of_scores",
    "pair_row",
    "pairs_of",
    "settled",
]


@dataclass(frozen=True, slots=True)
class Scored:
    """Different answers to one prompt, each with a number: the higher the better."""

    prompt: list[Message]
    answers: list[Message]
    scores: list[float]


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    gap: float | None = None
    """By how much; None: not said."""


@dataclass(frozen=True, slots=True)
class Label:
    """An answer that is good or bad."""

    prompt: list[Message]
    answer: Message
    good: bool


def pairs_of(scored: Scored, pairing: Pairing, min_gap: float = 0.0) -> tuple[list[Pair], int]:
    """The pairs of `scored`, and how many are none, since their scores are equal or nearer than `min_gap`.

    `all`: each answer with each; `adjacent`: each with the next worse one; `best-worst`: the two.
    """
    order = sorted(range(len(scored.scores)), key=lambda place: -scored.scores[place])
    match pairing:
        case "all":
            places = list(combinations(order, 2))
        case "adjacent":
            places = list(pairwise(order))
        case _:
            places = [(order[0], order[-1])]
    pairs = []
    for better, worse in places:
        gap = scored.scores[better] - scored.scores[worse]
        if gap > 0 and gap >= min_gap:
            pairs.append(Pair(scored.prompt, scored.answers[better], scored.answers[worse], gap))
    return pairs, len(places) - len(pairs)


def settled(pairs: Iterable[Pair]) -> tuple[list[Pair], int, int]:
    """`pairs` in their order, each once, without those that others contradict -> with how many were repeated, and how
    many were left out as contradictions."""
    given = [(key_of(pair.prompt), key_of([pair.chosen]), key_of([pair.rejected]), pair) for pair in pairs]
    said = {key[:3] for key in given}
    kept: dict[tuple[str, str, str], Pair] = {}
    num_repeated = num_contradicted = 0
    for prompt, chosen, rejected, pair in given:
        key = (prompt, chosen, rejected)
        if (prompt, rejected, chosen) in said:
            num_contradicted += 1
        elif key in kept:
            num_repeated += 1
        else:
            kept[key] = pair
    return list(kept.values()), num_repeated, num_contradicted


def labels_of_pairs(pairs: Iterable[Pair]) -> tuple[list[Label], int]:
    """Answers that were chosen are good, and those that were rejected bad; those that were both are left out, and
    counted."""
    found: dict[tuple[str, str], tuple[Label, set[bool]]] = {}
    for pair in pairs:
        for answer, good in ((pair.chosen, True), (pair.rejected, False)):
            key = (key_of(pair.prompt), key_of([answer]))
            found.setdefault(key, (Label(pair.prompt, answer, good), set()))[1].add(good)
    labels = [label for label, verdicts in found.values() if len(verdicts) == 1]
    return labels, len(found) - len(labels)


def labels_of_scores(scored: Scored, good_from: float, bad_to: float) -> tuple[list[Label], int]:
    """Answers with `good_from` or more are good, with `bad_to` or less bad; the others are left out, and counted."""
    labels = [
        Label(scored.prompt, answer, score >= good_from)
        for answer, score in zip(scored.answers, scored.scores, strict=True)
        if score >= good_from or score <= bad_to
    ]
    return labels, len(scored.answers) - len(labels)


def key_of(messages: Sequence[Message]) -> str:
    """Equal for equal messages."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def pair_row(pair: Pair, with_margin: bool) -> dict[str, Any]:
    """A row of format preference."""
    row: dict[str, Any] = {
        "prompt": as_written(pair.prompt),
        "chosen": _answer(pair.chosen),
        "rejected": _answer(pair.rejected),
    }
    if isinstance(row["chosen"], list) != isinstance(row["rejected"], list):  # both of one kind
        row |= {"chosen": [pair.chosen], "rejected": [pair.rejected]}
    return row | ({"margin": _short(pair.gap)} if with_margin and pair.gap is not None else {})


def label_row(label: Label) -> dict[str, Any]:
    """A row of format unpaired-preference."""
    return {"prompt": as_written(label.prompt), "completion": _answer(label.answer), "label": label.good}


def _answer(message: Message) -> str | list[Message]:
    return message["content"] if set(message) == {"role", "content"} else [message]


def _short(number: float) -> float:
    """Without the noise that a difference of decimal numbers has in its last digits."""
    return float(f"{number:.12g}") if math.isfinite(number) else number
