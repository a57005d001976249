"""What rewards are called, and how the block reads."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.problems import InvalidManifest, validate_document
from finetune_api.spec import RewardSource, reward_names


def rewards(*documents: dict[str, Any]) -> list[RewardSource]:
    return [validate_document(RewardSource, document) for document in documents]


FUNCTION: dict[str, Any] = {"function": {"call": "pkg.mod:_Is_Right"}}
METRIC: dict[str, Any] = {"metric": {"kind": "exact-match"}}
HTTP: dict[str, Any] = {"http": {"url": "https://judge.example:8443/score?kind=all"}}
MODEL: dict[str, Any] = {"model": {"source": "job://reward"}}


def test_a_reward_without_a_name_is_called_what_it_is() -> None:
    assert reward_names(rewards(FUNCTION, METRIC, HTTP, MODEL)) == ["is_right", "exact_match", "http", "model"]


def test_a_name_of_its_own_comes_first_whatever_the_order() -> None:
    listed = rewards(METRIC, METRIC | {"name": "exact_match"}, METRIC | {"name": "exact_match_2"}, METRIC)
    assert reward_names(listed) == ["exact_match_3", "exact_match", "exact_match_2", "exact_match_4"]


def test_sixteen_of_a_kind_have_sixteen_names() -> None:
    names = reward_names(rewards(*[{"function": {"call": f"m:{'long_' * 20}"}}] * 16))
    assert len(set(names)) == 16
    assert all(len(name) <= 40 for name in names)


@pytest.mark.parametrize(
    ("document", "kind"), [(FUNCTION, "function"), (METRIC, "metric"), (HTTP, "http"), (MODEL, "model")]
)
def test_a_reward_says_which_kind_it_is(document: dict[str, Any], kind: str) -> None:
    [reward] = rewards(document | {"name": "a", "weight": -2.0})
    assert reward.chosen == kind
    assert reward.to_document()["weight"] == -2.0


@pytest.mark.parametrize("call", ["a:b", "a.b.c:d_2", "_a:_b"])
def test_a_function_is_named_by_module_and_name(call: str) -> None:
    [reward] = rewards({"function": {"call": call, "settings": {"deep": {"er": [1, None]}}}})
    assert reward.function is not None
    assert reward.function.settings == {"deep": {"er": [1, None]}}


@pytest.mark.parametrize("call", ["b", "a.b", "a:b:c", "a:b.c", ":b", "a:", ".a:b", "a..b:c", "a:b()", "a b:c"])
def test_anything_else_is_no_function(call: str) -> None:
    with pytest.raises(InvalidManifest, match="must be module:function"):
        rewards({"function": {"call": call}})


@pytest.mark.parametrize("url", ["ftp://a/b", "http://", "judge/score", "http://a b/", "http://u:p@h/", "http://h/#f"])
def test_a_service_is_named_by_a_plain_address(url: str) -> None:
    with pytest.raises(InvalidManifest, match=r"http\.url: must be http://host/path or https://host/path"):
        rewards({"http": {"url": url}})
