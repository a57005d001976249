"""Metric rewards, with values worked by hand."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.spec import MetricReward
from finetune_trainers.rewards import Scored
from finetune_trainers.rewards.metrics import MetricScorer, last_number, rouge_l, sentence_bleu
from tests.trainers.rewards.worlds import episodes

PATH = "spec.method.grpo.rewards[1].metric"


def scored(reward: dict[str, Any], completions: list[str], **columns: list[Any]) -> Scored:
    scorer = MetricScorer(MetricReward.model_validate(reward), PATH)
    try:
        return scorer.score(episodes(completions, **columns))
    finally:
        scorer.close()


@pytest.mark.parametrize(
    ("kind", "text", "answer", "value"),
    [
        ("exact-match", " Paris\n", "Paris", 1.0),
        ("exact-match", "paris", "Paris", 0.0),
        ("numeric-answer", "so 3 + 4 makes 7.", "#### 7", 1.0),
        ("numeric-answer", "it costs $1,234.50", "1234.5", 1.0),
        ("numeric-answer", "minus: -5", "5", 0.0),
        ("numeric-answer", "no idea", "5", 0.0),
        ("numeric-answer", "42", 42, 1.0),
        ("token-f1", "The cat sat", "a cat sat down", 2 * 2 / (2 + 3)),
        ("rouge-l", "the cat sat", "The cat is sat on", 2 * 3 / (3 + 5)),
        ("rouge-l", "a b c d e", "c d a b e", 2 * 3 / (5 + 5)),
        ("rouge-l", "", "", 1.0),
        ("rouge-l", "", "word", 0.0),
        ("rouge-l", "猫 坐", "猫 坐", 1.0),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("bleu", "dog", "cat sat", 0.0),
        ("exact-match", "b", ["a", "b"], 1.0),
        ("rouge-l", "a b", ["a c", "a b c d"], 2 * 2 / (2 + 4)),
    ],
)
def test_a_metric_is_what_it_is_by_hand(kind: str, text: str, answer: Any, value: float) -> None:
    found = scored({"kind": kind}, [text], answer=[answer])
    assert found.values == [pytest.approx(value)]
    assert found.faults == {}


def test_bleu_of_a_short_sentence_by_hand() -> None:
    """Precisions 3/4, 1/3, 0/2 (half of one of two: 1/4) and 0/1 (a quarter of one), four words for four."""
    product = (3 / 4) * (1 / 3) * (1 / 4) * (1 / 4)
    assert sentence_bleu("the dog sat here", "the cat sat here") == pytest.approx(product ** (1 / 4), abs=1e-6)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", "3"),
        ("(−7)", "-7"),
        ("x=.5", "0.5"),
        ("-.25", "-0.25"),
        ("3 4 5,000", "5000"),
        ("12,34", "34"),
        ("7.", "7"),
        ("2.50", "2.5"),
        ("1e3", "1000"),
        (r"\boxed{42}", "42"),
        ("50%", "50"),
        ("1/2", "2"),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@given(st.text())
def test_any_text_has_a_last_number_or_none(text: str) -> None:
    assert last_number(text) is None or any(character.isdigit() for character in text)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_rouge_finds_the_longest_common_subsequence(words: list[str], others: list[str]) -> None:
    lengths = [[0] * (len(others) + 1) for _ in range(len(words) + 1)]
    for row, word in enumerate(words):
        for column, other in enumerate(others):
            grown = lengths[row][column] + 1 if word == other else 0
            lengths[row + 1][column + 1] = max(grown, lengths[row][column + 1], lengths[row + 1][column])
    total = len(words) + len(others)
    expected = 2 * lengths[-1][-1] / total if words and others else float(words == others)
    assert rouge_l(" ".join(words), " ".join(others)) == pytest.approx(expected)


def test_a_pattern_alone_is_looked_for_anywhere_in_the_answer() -> None:
    found = scored(
        {"kind": "regex", "pattern": r"<answer>\d+</answer>$"}, ["so <answer>7</answer>", "<answer>7</answer>."]
    )
    assert found.values == [1.0, 0.0]


def test_a_pattern_takes_the_part_that_is_compared_from_its_last_match() -> None:
    reward = {"kind": "exact-match", "pattern": r"<answer>(.*?)</answer>", "column": "right"}
    texts = ["<answer>6</answer> no: <answer>7</answer>", "7", "<answer>7</answer> no: <answer>6</answer>"]
    assert scored(reward, texts, right=["7", "7", "7"]).values == [1.0, 0.0, 0.0]


def test_a_pattern_without_a_group_takes_all_of_its_match() -> None:
    assert scored({"kind": "exact-match", "pattern": "[a-z]+"}, ["12 abc 3"], answer=["abc"]).values == [1.0]


def test_a_row_without_a_right_answer_has_no_score_and_the_others_have_theirs() -> None:
    found = scored({"kind": "numeric-answer"}, ["7", "7", "7", "7"], answer=["7", None, "seven", []])
    assert found.values == [1.0, None, None, None]
    assert found.faults == {
        1: "the row has no right answer in column answer",
        2: 'the right answer "seven" has no number',
        3: "the row has no right answer in column answer",
    }


def test_with_a_pattern_too_a_row_without_a_right_answer_costs_the_others_nothing() -> None:
    found = scored({"kind": "exact-match", "pattern": ".+"}, ["7", "7"], answer=["7", None])
    assert found.values == [1.0, None]
    assert "the row has no right answer in column answer" in found.faults[1]


@pytest.mark.parametrize("more", [{}, {"pattern": ".+"}], ids=["plain", "with a pattern"])
def test_of_rows_that_lack_the_column_there_is_no_opinion(more: dict[str, str]) -> None:
    """Of a mixture of sources a batch may be of one that has no such column."""
    scorer = MetricScorer(MetricReward.model_validate({"kind": "exact-match", "column": "solution"} | more), PATH)
    lacking, others = episodes(["7"], answer=["7"]), episodes(["7", "8"], solution=["7", None])
    try:
        assert scorer.score(lacking) == ([None], {})
        found = scorer.score([*lacking, *others])
    finally:
        scorer.close()
    assert found.values == [None, 1.0, None]
    assert list(found.faults) == [2], "a row that has the column has no right answer in it"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainers.rewards.metrics.PATTERN_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_pattern_that_would_take_for_ever_is_given_up() -> None:
    found = scored({"kind": "regex", "pattern": "^(a+)+$"}, ["a" * 50 + "b"])
    assert found.values == [None]
    assert found.faults == {0: "it took longer than 0.5 s"}
