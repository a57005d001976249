"""Ratings, rankings and pairs become rows, by hand-made examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.preference_data import Pairing
from finetune_trainers.data.turns import Message
from finetune_trainers.preference_data.opinions import (
    Pair,
    Scored,
    label_row,
    labels_of_pairs,
    labels_of_scores,
    pair_row,
    pairs_of,
    settled,
)

PROMPT = [{"role": "user", "content": "q"}]


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def scored(**scores: float) -> Scored:
    return Scored(PROMPT, [said(text) for text in scores], list(scores.values()))


def names(pairs: list[Pair]) -> list[str]:
    return [f"{pair.chosen['content']}>{pair.rejected['content']}" for pair in pairs]


@pytest.mark.parametrize(
    ("pairing", "wanted", "num_ties"),
    [
        ("all", ["b>a", "b>c", "b>d", "a>d", "c>d"], 1),
        ("adjacent", ["b>a", "c>d"], 1),
        ("best-worst", ["b>d"], 0),
    ],
)
def test_the_higher_number_is_chosen_and_equal_ones_are_a_tie(
    pairing: Pairing, wanted: list[str], num_ties: int
) -> None:
    pairs, ties = pairs_of(scored(a=3, b=5, c=3, d=1), pairing)
    assert names(pairs) == wanted
    assert ties == num_ties


def test_what_is_nearer_than_the_least_gap_is_a_tie_and_what_is_as_far_is_none() -> None:
    pairs, ties = pairs_of(scored(a=1, b=2, c=2.5), "all", min_gap=1)
    assert [(pair.chosen["content"], pair.gap) for pair in pairs] == [("c", 1.5), ("b", 1)]
    assert ties == 1


@given(st.lists(st.integers(1, 5), min_size=2, max_size=7), st.sampled_from([0.0, 1.0, 2.0]))
def test_every_pair_of_answers_is_a_pair_or_a_tie_and_the_chosen_one_is_higher(scores: list[int], gap: float) -> None:
    answers = {said(str(place))["content"]: score for place, score in enumerate(scores)}
    pairs, ties = pairs_of(Scored(PROMPT, list(map(said, answers)), [float(one) for one in scores]), "all", gap)
    assert len(pairs) + ties == len(scores) * (len(scores) - 1) // 2
    assert all(answers[pair.chosen["content"]] - answers[pair.rejected["content"]] >= max(gap, 1e-9) for pair in pairs)


def test_the_same_judgement_stays_once_and_two_that_contradict_each_other_go() -> None:
    a, b, c = said("a"), said("b"), said("c")
    given_ = [Pair(PROMPT, a, b), Pair(PROMPT, a, b), Pair(PROMPT, b, c), Pair(PROMPT, c, b), Pair(PROMPT, a, c)]
    pairs, num_repeated, num_contradicted = settled(given_)
    assert names(pairs) == ["a>b", "a>c"]
    assert (num_repeated, num_contradicted) == (1, 2)


def test_the_same_answers_to_another_prompt_are_another_judgement() -> None:
    other = [{"role": "user", "content": "another"}]
    pairs, _, num_contradicted = settled([Pair(PROMPT, said("a"), said("b")), Pair(other, said("b"), said("a"))])
    assert (len(pairs), num_contradicted) == (2, 0)


def test_of_pairs_an_answer_that_was_chosen_is_good_and_one_that_was_both_is_left_out() -> None:
    labels, undecided = labels_of_pairs([Pair(PROMPT, said("a"), said("b")), Pair(PROMPT, said("b"), said("c"))])
    assert [(label.answer["content"], label.good) for label in labels] == [("a", True), ("c", False)]
    assert undecided == 1


def test_of_ratings_those_between_are_neither_good_nor_bad() -> None:
    labels, undecided = labels_of_scores(scored(a=4, b=3, c=2, d=5), good_from=4, bad_to=2)
    assert [label_row(label) for label in labels] == [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q", "completion": "c", "label": False},
        {"prompt": "q", "completion": "d", "label": True},
    ]
    assert undecided == 1


def test_a_row_keeps_what_is_more_than_text() -> None:
    system = [{"role": "system", "content": "s"}, *PROMPT]
    thought = said("a") | {"reasoning_content": "hm"}
    assert pair_row(Pair(system, thought, said("b"), 0.1 + 0.2), with_margin=True) == {
        "prompt": system,
        "chosen": [thought],
        "rejected": [said("b")],
        "margin": 0.3,
    }
    assert pair_row(Pair(PROMPT, said("a"), said("b"), 1.0), with_margin=False) == {
        "prompt": "q",
        "chosen": "a",
        "rejected": "b",
    }
