"""The figures of answers, worked by hand."""

from __future__ import annotations

import math

import pytest

from finetune_trainers.generation_metrics import (
    answer_metrics,
    corpus_bleu,
    exact_match,
    token_f1,
)


def test_white_space_at_the_ends_does_not_spoil_an_exact_match() -> None:
    assert exact_match(" Paris.\n", "Paris.")


def test_another_case_spoils_an_exact_match() -> None:
    assert not exact_match("paris.", "Paris.")


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        # shared: capital, is, paris = 3; 2 * 3 / (3 + 5)
        ("Capital is Paris!", "The capital of France is Paris.", 0.75),
        # articles and case are nothing to SQuAD: [cat] and [cat]
        ("A cat", "the Cat", 1.0),
        # a word counts as often as both have it: shared b = 1; 2 * 1 / (3 + 1)
        ("b b b", "b", 0.5),
        ("one", "two", 0.0),
        # nothing but an article and a comma is no word; both empty agree
        ("the", ",", 1.0),
        ("", "word", 0.0),
        # punctuation is taken out, not turned into a space: [its] and [its]
        ("it's", "its", 1.0),
    ],
)
def test_token_f1_is_that_of_squad(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_bleu_of_the_references_themselves_is_100() -> None:
    assert corpus_bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100)


def test_bleu_is_the_geometric_mean_of_precisions_times_the_brevity_penalty() -> None:
    # 7 words against 8, the first 7 the same: all precisions are 1, the penalty is exp(1 - 8/7).
    assert corpus_bleu(["a b c d e f g"], ["a b c d e f g h"]) == pytest.approx(100 * math.exp(1 - 8 / 7))
    # words 4/5, pairs 3/4, triples 2/3, quadruples 1/2: their product is 0.2.
    assert corpus_bleu(["a b c d x"], ["a b c d e"]) == pytest.approx(100 * 0.2**0.25)


def test_bleu_counts_over_the_whole_set_and_not_per_answer() -> None:
    answers, references = ["a b c d e", "v w x y q"], ["a b c d e", "v w x y z"]
    # words 9/10, pairs 7/8, triples 5/6, quadruples 3/4
    assert corpus_bleu(answers, references) == pytest.approx(100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)


def test_the_metrics_are_means_over_the_answers() -> None:
    metrics = answer_metrics(["a b c d e", "w"], ["a b c d e", "z"])
    assert metrics["eval_exact_match"] == 0.5
    assert metrics["eval_f1"] == 0.5
    assert set(metrics) == {"eval_exact_match", "eval_bleu", "eval_f1"}


def test_as_many_answers_as_references_are_needed() -> None:
    with pytest.raises(ValueError, match="shorter than"):
        answer_metrics(["one", "two"], ["one"])
