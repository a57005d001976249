"""Reward functions in their own process: what they are given, and every way in which they fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_api.spec import FunctionReward
from finetune_trainers.errors import UserError
from finetune_trainers.rewards import Episode
from finetune_trainers.rewards.functions import FunctionScorer
from tests.trainers.rewards.worlds import MODULE, episodes

Make = Callable[..., FunctionScorer]
PATH = "spec.method.grpo.rewards[0].function.call"


@pytest.fixture
def make() -> Iterator[Make]:
    """A scorer of one of the sample functions."""
    made: list[FunctionScorer] = []

    def scorer(function: str, **fields: Any) -> FunctionScorer:
        call = function if ":" in function else f"{MODULE}:{function}"
        made.append(FunctionScorer(FunctionReward(call=call, **fields), PATH))
        return made[-1]

    yield scorer
    for one in made:
        one.close()


def test_a_function_is_given_prompts_completions_and_the_columns_that_it_names(make: Make) -> None:
    scored = make("matches").score(episodes(["a", "b"], answer=["a", "c"], other=[1, 2]))
    assert scored.values == [1.0, 0.0]
    assert scored.faults == {}


def test_settings_are_given_at_every_call(make: Make) -> None:
    scorer = make("matches", settings={"factor": 2.5})
    assert [scorer.score(episodes(["a"], answer=["a"])).values for _ in range(2)] == [[2.5], [2.5]]


def test_settings_stand_above_columns_of_the_same_name(make: Make) -> None:
    given_always = len(["prompts", "messages", "num_tokens", "ended"])
    scorer = make("everything_but", settings={"factor": 2.0})
    assert scorer.score(episodes(["a"], factor=[9.0], other=[1])).values == [2.0 * (given_always + 1)]


def test_a_function_that_takes_anything_is_given_everything(make: Make) -> None:
    given_always = len(["prompts", "messages", "num_tokens", "ended"])
    assert make("everything").score(episodes(["a"], one=[1], two=[2])).values == [given_always + 2.0]


def test_a_function_may_ask_for_the_conversation_and_how_the_answer_came_about(make: Make) -> None:
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    cut = Episode(prompt, "one two three", {}, num_tokens=3, ended=False)
    assert make("about_the_rest").score([cut, *episodes(["a"])]).values == [230.0, 111.0]


def test_of_rows_that_lack_a_column_which_a_function_needs_it_has_no_opinion(make: Make) -> None:
    mixed = [*episodes(["b"]), *episodes(["a", "c"], answer=["a", "a"])]
    assert make("matches").score(mixed) == ([None, 1.0, 0.0], {})


def test_rows_that_lack_a_column_which_a_function_can_do_without_give_none_for_it(make: Make) -> None:
    mixed = [*episodes(["a"], hint=["x"]), *episodes(["b"])]
    assert make("hinted").score(mixed).values == [1.0, 0.0]


@pytest.mark.parametrize("function", ["length", "later"])
def test_a_function_may_be_async(make: Make, function: str) -> None:
    assert make(function).score(episodes(["abc", ""])).values == [3.0, 0.0]


def test_a_function_may_return_an_array(make: Make) -> None:
    assert make("arrays").score(episodes(["a", "b", "c"])).values == [0.0, 1.0, 2.0]


def test_no_opinion_is_no_failure(make: Make) -> None:
    scored = make("without_opinion").score(episodes(["a", "?"]))
    assert scored.values == [1.0, None]
    assert scored.faults == {}


def test_the_module_is_imported_once(make: Make) -> None:
    scorer = make("counts_calls")
    assert [scorer.score(episodes(["a"])).values for _ in range(3)] == [[1.0], [2.0], [3.0]]


def test_what_a_function_prints_is_no_answer(make: Make) -> None:
    assert make("prints").score(episodes(["a"])).values == [1.0]


def test_more_text_than_a_pipe_holds_goes_through(make: Make) -> None:
    long = "x" * 3_000_000
    assert make("length").score(episodes([long, long])).values == [3e6, 3e6]


def test_one_answer_that_a_function_raises_for_costs_the_others_nothing(make: Make) -> None:
    scored = make("raises_for_bad").score(episodes(["a", "bad", "b"]))
    assert scored.values == [1.0, None, 1.0]
    assert list(scored.faults) == [1]
    assert scored.faults[1].startswith("ValueError: cannot read this (sample_rewards.py:")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("one_too_few", "it returned 1 scores for 2 answers"),
        ("one_mean", "it returned 1 scores for 2 answers"),
        ("always_raises", "KeyError: 'never'"),
        ("one_number", "it returned 1.0 (float), not a list of numbers"),
    ],
)
def test_a_function_that_fails_for_all_leaves_all_without_a_score(make: Make, function: str, said: str) -> None:
    scored = make(function).score(episodes(["a", "b"]))
    assert scored.values == [None, None]
    assert all(said in fault for fault in scored.faults.values())
    assert len(scored.faults) == 2


@pytest.mark.parametrize(
    ("function", "bad", "said"),
    [
        ("not_finite", "nan", "it returned nan, which is no finite number"),
        ("not_finite", "inf", "it returned -inf, which is no finite number"),
        ("not_numbers", "bad", "it returned '7' (str), which is no number"),
    ],
)
def test_what_is_no_finite_number_is_a_failure_of_its_answer(make: Make, function: str, bad: str, said: str) -> None:
    scored = make(function).score(episodes(["a", bad]))
    assert scored.values == [2.0, None]
    assert scored.faults == {1: said}


@pytest.mark.parametrize(
    ("function", "seconds", "said"),
    [
        ("hangs_for_bad", 0.3, "it took longer than 0.3 s"),
        ("ends_for_bad", 60, "its process ended with code 7"),
        ("exits_for_bad", 60, "its process ended with code 1"),
    ],
)
def test_a_function_that_does_not_come_back_is_begun_anew_for_the_next_batch(
    make: Make, function: str, seconds: float, said: str
) -> None:
    scorer = make(function, timeout_seconds=seconds)
    lost = scorer.score(episodes(["a", "bad"]))
    assert lost.values == [None, None]
    assert lost.faults == {0: said, 1: said}
    scorer._reward = scorer._reward.model_copy(update={"timeout_seconds": 60.0})  # this machine may be slow
    assert scorer.score(episodes(["a", "b"])).values == [1.0, 1.0]


def test_answers_that_are_given_one_by_one_have_the_time_of_two_batches(make: Make) -> None:
    scorer = make("raises_for_bad", timeout_seconds=60.0)
    now = iter([0.0, 0.0, 119.0, 121.0])
    scorer._clock = lambda: next(now)
    found = scorer.score(episodes(["a", "b", "bad"]))
    assert found.values == [1.0, 1.0, None]
    assert found.faults == {2: "it took longer than 60 s, answer by answer"}


def test_a_function_that_ends_when_answers_are_given_one_by_one_is_begun_anew_too(make: Make) -> None:
    scorer = make("ends_alone_for_bad")
    lost = scorer.score(episodes(["a", "bad", "b"]))
    assert lost.values == [1.0, None, None]
    assert lost.faults == dict.fromkeys((1, 2), "its process ended with code 7")
    assert scorer.score(episodes(["a", "b"])).values == [1.0, 1.0]


def test_what_a_function_started_ends_with_it(make: Make, tmp_path: Path) -> None:
    scorer = make("starts_a_child", settings={"folder": str(tmp_path)})
    assert scorer.score(episodes(["a"])).values == [1.0]
    child = psutil.Process(int((tmp_path / "child").read_text()))
    assert is_running(child)
    scorer.close()
    deadline = time.monotonic() + 30
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)  # until the system has carried it out
    assert not is_running(child)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_function_ends_with_its_job_even_while_it_hangs(make: Make) -> None:
    """The worker is gone, and its ends of the pipes with it."""
    scorer = make("hangs_for_bad", timeout_seconds=0.3)
    process = scorer._process
    assert process is not None
    os.write(process._out, b'{"arguments": {"completions": ["bad"]}}\n')
    os.close(process._out)
    assert process._process.wait(timeout=30) == 0
    process._out = os.open(os.devnull, os.O_WRONLY)


def test_a_function_that_was_killed_says_by_what(make: Make) -> None:
    scorer = make("length")
    process = scorer._process
    assert process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    assert scorer.score(episodes(["a"])).faults == {0: "its process was ended by signal 9"}


@pytest.mark.parametrize(
    ("call", "settings", "said"),
    [
        ("no.such.module:f", {}, "ModuleNotFoundError: No module named 'no'"),
        (f"{MODULE}:no_such", {}, f"the module {MODULE} has no function no_such"),
        (f"{MODULE}:NOT_A_FUNCTION", {}, "is no function but a int"),
        (f"{MODULE}:no_completions", {}, "it takes no argument called completions"),
        (f"{MODULE}:length", {"unit": "words"}, "it takes no unit, which settings gives it"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_with_its_field(
    make: Make, call: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        make(call, settings=settings)
    [problem] = refused.value.problems
    assert problem.path == PATH
    assert said in problem.message
    assert call in str(problem.value)


def test_of_rows_that_all_lack_a_column_a_function_is_not_asked(make: Make) -> None:
    """Of a mixture of sources a batch may be of one that has no such column."""
    assert make("matches").score(episodes(["a"], right=["a"], source=["b"])) == ([None], {})


def test_a_function_needs_the_columns_that_are_neither_given_nor_set(make: Make) -> None:
    assert make("matches").needs == ["answer"]
    assert make("everything").needs == []
