"""The rewards of a plan: what is refused before any worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec import RewardSource
from finetune_trainers.errors import UserError
from finetune_trainers.rewards.building import check_rewards
from finetune_trainers.rewards.columns import Needed
from tests.trainers.rewards.worlds import MODULE

FIELD = "spec.method.ppo.rewards"


def problems(*documents: dict[str, Any]) -> list[tuple[str | None, str]]:
    """Field and message of each, the field below that of the rewards."""
    try:
        check_rewards([RewardSource.model_validate(document) for document in documents], FIELD)
    except UserError as error:
        return [(problem.path and problem.path.removeprefix(FIELD), problem.message) for problem in error.problems]
    return []


def test_what_can_be_had_has_no_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", "Bearer 7")
    assert not problems(
        {"function": {"call": f"{MODULE}:length"}},
        {"metric": {"kind": "rouge-l"}},
        {"http": {"url": "http://nobody.invalid/", "headersFromEnv": {"Authorization": "JUDGE"}}},
    )


def test_metrics_and_functions_say_which_columns_they_need() -> None:
    needed = check_rewards(
        [
            RewardSource.model_validate(document)
            for document in (
                {"function": {"call": f"{MODULE}:matches"}},
                {"function": {"call": f"{MODULE}:everything"}},
                {"metric": {"kind": "rouge-l"}},
                {"metric": {"kind": "bleu", "column": "right"}},
                {"metric": {"kind": "regex", "pattern": "a"}},
            )
        ],
        FIELD,
    )
    assert needed == [
        Needed("answer", f"{FIELD}[0].function.call", f"{MODULE}:matches"),
        Needed("answer", f"{FIELD}[2].metric.column", "answer"),
        Needed("right", f"{FIELD}[3].metric.column", "right"),
    ]


def test_every_reward_that_cannot_be_had_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE", raising=False)
    fields, messages = zip(
        *problems(
            {"function": {"call": "no_such_module:f"}},
            {"metric": {"kind": "bleu"}},
            {"http": {"url": "http://judge/", "headersFromEnv": {"Authorization": "JUDGE"}}},
            {"function": {"call": f"{MODULE}:no_completions"}},
        ),
        strict=True,
    )
    assert fields == ("[0].function.call", "[2].http.headersFromEnv.Authorization", "[3].function.call")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in messages[0]
    assert "the environment variable JUDGE is not set" in messages[1]
    assert "it takes no argument called completions" in messages[2]


def test_a_module_on_the_python_path_of_the_job_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions):\n    return [-len(text) for text in completions]\n"
    )
    function = {"function": {"call": "my_rewards:short"}}
    assert problems(function)
    monkeypatch.syspath_prepend(tmp_path)
    assert not problems(function)


def test_a_module_that_fails_to_import_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rewards.py").write_text("limit = 1\nlimit / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    [(_, message)] = problems({"function": {"call": "broken_rewards:f"}})
    assert "ZeroDivisionError: division by zero (broken_rewards.py:2)" in message
