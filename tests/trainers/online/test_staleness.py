"""With a staleness of 1 the engine writes the next rollouts while the policy learns, with the weights that it has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pytest

from finetune_api.plan import RunPlan
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.online.episodes import Experience
from finetune_trainers.online.models import Models
from finetune_trainers.rollout import Completion, OnProgress, Request, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import METHODS, OnlineWorld

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

STILL = {"training.learningRate": 1e-12}
"""So little that no weight changes: then it does not matter who wrote when."""


class Elsewhere(InProcessEngine):
    """Stands for an engine in another process: what it is told to start is written at once, by the policy's weights of
    that moment."""

    is_policy = False
    calls: list[str]
    written: list[Completion] | None = None
    is_closed = False

    def start(self, requests: Sequence[Request], sampling: Sampling) -> None:
        self._called("start")
        self.written = super().generate(requests, sampling)

    def collect(self, on_progress: OnProgress | None = None) -> list[Completion]:
        assert self.written is not None
        found, self.written = self.written, None
        self._called("collect")
        return found

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Completion]:
        self._called("generate")
        return super().generate(requests, sampling, on_progress)

    def update_weights(self) -> None:
        self._called("sync")

    def sleep(self) -> None:
        self._called("sleep")

    def close(self) -> None:
        if not self.is_closed:
            self.calls.append("close")
        self.is_closed = True

    def _called(self, name: str) -> None:
        assert self.written is None, "it is writing"
        self.calls.append(name)


class Runs:
    """Runs of one world."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.online = OnlineWorld.at(folder / "world")
        self.folder = folder
        self.calls: dict[str, list[str]] = {}

        def start(
            plan: Any, model: Any, settings: Any, length: int, module: Any, end_ids: Any, context: Any, _: Any
        ) -> Any:
            engine = Elsewhere(module, 0, end_ids, context)
            engine.calls = self.calls.setdefault(self._name, [])
            return engine

        monkeypatch.setattr("finetune_trainers.rollout.vllm_engine.start_vllm", start)
        monkeypatch.setattr("finetune_trainers.rollout.vllm_process.find_python", lambda path: path)

    def plan(
        self, staleness: int, changes: dict[str, Any] | None = None, evaluated: bool = False, **settings: Any
    ) -> RunPlan:
        grpo = METHODS["grpo"]["grpo"] | settings | {"vllm": {"maxStaleness": staleness, "gapLimit": 100}}
        defaults = {"method": {"grpo": grpo}, "training.maxSteps": 4, "training.learningRate": 0.01}
        return self.online.plan("grpo", defaults | (changes or {}), evaluated=evaluated)

    def run(self, name: str, plan: RunPlan) -> None:
        self._name = name
        self.online.train(plan, self.folder / name)

    def curve(self, name: str, figure: str) -> list[float]:
        return self.online.curve(self.folder / name, figure)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_rollouts_are_those_of_the_weights_before_the_last_iteration_and_of_the_next_prompts(runs: Runs) -> None:
    for name, plan in (("0", runs.plan(0)), ("1", runs.plan(1)), ("still", runs.plan(0, STILL))):
        runs.run(name, plan)
    still, at_once, ahead = (runs.curve(name, "reward") for name in ("still", "0", "1"))
    assert ahead[:2] == still[:2], "the second iteration is written before the first is learned from"
    assert at_once[1] != still[1]
    assert ahead[2] != still[2], "the third has learned from the first"
    assert runs.curve("1", "staleness") == [0, 1, 1, 1]
    assert runs.curve("0", "staleness") == []
    gaps = runs.curve("1", "rollout_gap")
    assert gaps[0] < 1e-5 < min(gaps[1:]), "what was learned meanwhile is corrected for"


def test_it_never_sleeps_is_given_weights_between_iterations_and_starts_nothing_that_nobody_learns_from(
    runs: Runs,
) -> None:
    runs.run("0", runs.plan(0, {"training.maxSteps": 3}))
    runs.run("1", runs.plan(1, {"training.maxSteps": 3}))
    assert runs.calls["0"] == [*["sync", "generate", "sleep"] * 3, "close"]
    iterations = [["sync", "generate", "start"], ["collect", "sync", "start"], ["collect", "sync"]]
    assert runs.calls["1"] == [*chain(*iterations), "close"]


def test_a_stop_ends_what_is_being_written_before_the_weights_are_confirmed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would want the device's memory, and nobody waits for the answers."""
    distances = Models.distances

    def told(self: Models, batch: Experience) -> Any:
        runs.calls["1"].append("confirm")
        return distances(self, batch)

    monkeypatch.setattr(Models, "distances", told)
    monkeypatch.setattr(SingleProcessContext, "should_stop", lambda _: runs.calls["1"].count("start") == 2)
    runs.run("1", runs.plan(1, STILL | {"checkpoint": {"everySteps": 9}}, maxKl=10))
    assert [call for call, _ in groupby(runs.calls["1"])][-3:] == ["start", "close", "confirm"]


def test_evaluation_is_by_the_newest_weights_and_costs_no_rollout(runs: Runs) -> None:
    changes = {"training.evalEverySteps": 1}
    for staleness in (0, 1):
        runs.run(str(staleness), runs.plan(staleness, STILL | changes, evaluated=True))
    for figure in ("reward", "eval_reward", "loss"):
        assert len(runs.curve("1", figure)) >= 4
        assert runs.curve("1", figure) == pytest.approx(runs.curve("0", figure), abs=1e-6)
    assert runs.curve("1", "staleness") == [0, 1, 1, 1]
    assert runs.calls["1"][:6] == ["sync", "generate", "sync", "generate", "start", "collect"], "evaluated before"
    assert runs.calls["1"][6:10] == ["sync", "generate", "sync", "start"], "what was collected is used after it"


def test_prompts_that_are_asked_for_want_of_others_are_the_next_ones(runs: Runs) -> None:
    letter = {"function": {"call": "tests.trainers.online.scores:many_letters", "settings": {"letter": "j"}}}
    for staleness in (0, 1):
        runs.run(str(staleness), runs.plan(staleness, STILL, dynamicSampling=2, rewards=[letter]))
    asked = runs.curve("1", "prompts_asked")
    assert max(asked) > 4
    for figure in ("prompts_asked", "reward"):
        assert runs.curve("1", figure) == runs.curve("0", figure)


def test_going_on_writes_the_rollouts_of_the_next_iteration_anew(runs: Runs, tmp_path: Path) -> None:
    plan = runs.plan(1, STILL | {"checkpoint": {"everySteps": 2, "keepLast": 8}})
    assert plan.checkpoint is not None
    where = {"uri": f"file://{tmp_path}/checkpoints"}
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update=where)})
    runs.run("whole", plan)
    storage = open_storage(where["uri"])
    for checkpoint, listing in listed(storage).items():
        if checkpoint.step > 2:
            storage.delete(list(listing.sizes))
    runs.run("rest", plan)
    assert runs.curve("whole", "staleness") == [0, 1, 1, 1]
    assert runs.curve("rest", "staleness") == [0, 1]
    assert runs.curve("rest", "reward") == runs.curve("whole", "reward")[2:], "the same prompts, drawn the same way"


def test_who_is_waited_for_is_told(runs: Runs) -> None:
    runs.run("1", runs.plan(1, {"training.maxSteps": 2}))
    reports = [json.loads(line) for line in (runs.folder / "1" / "progress.jsonl").read_text().splitlines()]
    told = [(one["phase"], one["role"]) for one in reports if one.get("phase")]
    first = [("sync", "vLLM"), ("generate", "vLLM"), ("score", "reward many_letters")]
    learning = [("judge", "policy"), ("train", "policy")]
    second = [("generate", "vLLM"), ("sync", "vLLM"), ("score", "reward many_letters")]
    assert [key for key, _ in groupby(told)] == [*first, *learning, *second, *learning]
