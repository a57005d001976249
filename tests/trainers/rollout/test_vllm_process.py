"""What the trainer makes of a vLLM that is not there, does not answer, or answers nonsense."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune_api.failures import FailureClass
from finetune_api.plan import RunPlan
from finetune_trainers.errors import OutOfMemoryError, TrainerError, UserError
from finetune_trainers.launch import run
from finetune_trainers.rollout import Completion, Sampling
from finetune_trainers.rollout.vllm_engine import VllmEngine
from finetune_trainers.rollout.vllm_process import VARIABLE, VllmRefused, check_vllm, find_python, vllm_command
from tests.trainers.factories import tiny_plan
from tests.trainers.rollout.writers import requests_for

CANNED = Path(__file__).with_name("vllm_canned.py")
GRPO = {
    "grpo": {
        "groupSize": 4,
        "maxSeqLength": 64,
        "sampling": {"maxNewTokens": 8},
        "vllm": {},
        "rewards": [{"metric": {"kind": "bleu"}}],
    }
}
DRAWN = Sampling(max_new_tokens=8)
WRITTEN = Completion([5, 6], [-1.0, -2.0], False)


@pytest.fixture
def engine_that(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine whose other side goes wrong in the way that is named. Only one that is silent is given up soon: on a
    busy machine any other may take its time too."""
    made: list[VllmEngine] = []

    def make(how: str) -> VllmEngine:
        if how == "is silent":
            monkeypatch.setattr("finetune_trainers.rollout.vllm_process.SILENT_SECONDS", 0.2)
        command = [sys.executable, "-I", str(CANNED), how]
        made.append(VllmEngine(command, {}, nn.Linear(3, 2), [1], [], torch.float32))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
        engine.close()


def test_answers_come_in_the_order_of_requests_and_progress_is_told(engine_that: Any) -> None:
    engine, told = engine_that("is well"), []
    engine.wake()
    engine.update_weights()
    answers = engine.generate(requests_for([[1], [2, 3], [4]]), DRAWN, lambda done, of: told.append((done, of)))
    engine.sleep()
    assert answers == [WRITTEN] * 3
    assert told == [(1, 3), (3, 3)]
    assert engine.generate([], DRAWN) == [], "a rank may have nothing to ask"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("dies", "ended with code 3"),
        ("is silent", "has said nothing for 0.2 s"),
        ("refuses", "RuntimeError: no"),
        ("answers too few", "1 answers to 2 prompts"),
        ("leaves out log-probabilities", "2 tokens with 1 log-probabilities"),
        ("writes too much", "99 tokens"),
        ("writes nothing", "0 tokens"),
    ],
)
def test_a_vllm_that_goes_wrong_ends_the_run_and_says_how(how: str, words: str, engine_that: Any) -> None:
    engine = engine_that(how)
    with pytest.raises(TrainerError, match=words):
        engine.generate(requests_for([[1], [2]]), DRAWN)


@pytest.mark.parametrize(("how", "words"), [("dies", "ended with code 3"), ("refuses", "RuntimeError: no")])
def test_what_goes_wrong_while_the_policy_learns_is_said_when_answers_are_collected(
    how: str, words: str, engine_that: Any
) -> None:
    engine = engine_that(how)
    engine.start(requests_for([[1], [2]]), DRAWN)
    with pytest.raises(TrainerError, match=words):
        engine.collect()


def test_answers_are_written_between_start_and_collect(engine_that: Any) -> None:
    engine, told = engine_that("is well"), []
    for requests in ([[1], [2, 3]], [], [[4]]):
        engine.start(requests_for(requests), DRAWN)
        with pytest.raises(AssertionError, match="an answer is written with one policy"):
            engine.update_weights()
        assert engine.collect(lambda done, of: told.append((done, of))) == [WRITTEN] * len(requests)
        engine.update_weights()
    assert told == [(1, 2), (2, 2), (1, 1), (1, 1)]


def test_one_that_is_ended_while_it_writes_leaves_nothing_behind(engine_that: Any) -> None:
    engine = engine_that("writes for ever")
    engine.start(requests_for([[1]]), DRAWN)
    process = engine._process._process
    engine.close()
    assert process.returncode == -signal.SIGKILL


def test_a_vllm_that_was_killed_most_likely_had_no_memory(engine_that: Any) -> None:
    with pytest.raises(OutOfMemoryError, match="kvCacheGib"):
        engine_that("is killed").generate(requests_for([[1]]), DRAWN)


def test_a_vllm_that_cannot_start_says_why(engine_that: Any) -> None:
    with pytest.raises(VllmRefused, match="no such model"):
        engine_that("does not start")


def test_a_server_ends_with_the_trainer_that_started_it() -> None:
    """However that ends, its end of the pipe is closed; here before anything was said."""
    theirs, ours = os.pipe()
    command = [*vllm_command(sys.executable), str(theirs), "1", "0"]
    with subprocess.Popen(command, pass_fds=(theirs,)) as server:
        os.close(theirs)
        os.close(ours)
        assert server.wait(60) == 0


def plan_with(changes: dict[str, Any], folder: Path) -> RunPlan:
    """Of a model and rows that nobody looks at."""
    return tiny_plan(folder / "model", folder / "rows.jsonl", changes)


def test_without_vllm_a_job_ends_before_anything_is_started_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    outcome = run(plan_with({"method": GRPO}, tmp_path), tmp_path / "run", tmp_path / "cache", use_ray=False)
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    (problem,) = outcome.failure.problems
    assert problem.path == "spec.method.grpo.vllm"
    assert VARIABLE in problem.message
    assert "Install vllm" in problem.message
    assert not outcome.seconds, "neither model nor data were looked at"


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("/nowhere/python", "is no interpreter"),
        (str(CANNED.parent), "is no interpreter"),
        (sys.executable, "no package"),
    ],
)
def test_a_variable_that_names_no_vllm_is_told_from_one_that_is_not_set(
    python: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, python)
    with pytest.raises(UserError, match=words) as caught:
        find_python("spec.method.ppo.vllm")
    assert f"{VARIABLE} names {python}" in str(caught.value)


def test_a_job_without_vllm_needs_none(tmp_path: Path) -> None:
    assert check_vllm(plan_with({}, tmp_path)) == []
