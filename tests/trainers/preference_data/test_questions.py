"""What a judge is shown, and how its word is read."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.preference_data import ToJudge
from finetune_trainers.preference_data.questions import (
    Outcome,
    Question,
    Verdict,
    messages_for,
    outcome_of,
    verdict_in,
)

FIRST, SECOND, TIE = Verdict.FIRST, Verdict.SECOND, Verdict.TIE


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Because.\n\nVerdict: A", FIRST),
        ("Because.\n**Verdict: B**", SECOND),
        ("verdict: tie.", TIE),
        ("Final verdict is below.\nVerdict: Answer A", FIRST),
        ("Verdict: A\nNo, I was wrong.\nVerdict: B", SECOND),
        ("[[A]]", FIRST),
        ("b", SECOND),
        ("Answer A says 'Verdict: A' itself, which I do not obey.\nVerdict: B", SECOND),
        ("Both are good.", None),
        ("Verdict: C", None),
        ("A is better", None),
        ("", None),
    ],
)
def test_the_last_line_with_a_verdict_counts(text: str, verdict: Verdict | None) -> None:
    assert verdict_in(text) is verdict


@pytest.mark.parametrize(
    ("straight", "turned", "outcome"),
    [
        (FIRST, SECOND, Outcome.FIRST),
        (SECOND, FIRST, Outcome.SECOND),
        (TIE, TIE, Outcome.TIE),
        (FIRST, FIRST, Outcome.CHANGED),
        (SECOND, SECOND, Outcome.CHANGED),
        (FIRST, TIE, Outcome.CHANGED),
        (TIE, SECOND, Outcome.CHANGED),
        (None, FIRST, Outcome.UNREADABLE),
        (FIRST, None, Outcome.UNREADABLE),
    ],
)
def test_only_a_verdict_that_follows_the_answer_is_a_preference(
    straight: Verdict | None, turned: Verdict | None, outcome: Outcome
) -> None:
    assert outcome_of(straight, turned) is outcome


def test_a_judge_sees_the_whole_conversation_and_both_answers_in_their_order() -> None:
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    system, user = messages_for(Question(prompt, "one", "two"), "Judge the spelling.")
    assert system == {"role": "system", "content": "Judge the spelling."}
    assert user["content"].index("Be short.") < user["content"].index("Why?") < user["content"].index("one")
    assert user["content"].index("<answer_a>\none") < user["content"].index("<answer_b>\ntwo")


def test_a_question_is_known_by_all_that_could_change_its_answer_and_by_nothing_else() -> None:
    asked = ToJudge(source="file:///a.jsonl", to="b.jsonl", url="http://here/v1", model="big")
    question = Question([{"role": "user", "content": "q"}], "a", "b")
    key = question.key(asked)
    assert key == question.key(asked.model_copy(update={"url": "http://elsewhere/v1", "concurrency": 2, "seed": 9}))
    changes: list[dict[str, Any]] = [
        {"model": "small"},
        {"temperature": 0.5},
        {"max_tokens": 9},
        {"instructions": "other"},
    ]
    others = [question.key(asked.model_copy(update=change)) for change in changes]
    others.append(Question(question.prompt, "b", "a").key(asked))
    assert len({key, *others}) == 6
