"""Rollouts by beam search: a group is the best beams of its prompt, and a person hears once what that does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune_trainers.rollout import Completion, Request, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import COMMON, OnlineWorld

pytestmark = [pytest.mark.training, *WHEN_TRAINING]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("online"))


@pytest.mark.parametrize(("method", "settings", "each"), [("grpo", {"groupSize": 4}, 4), ("ppo", {"passes": 2}, 1)])
def test_a_policy_learns_from_the_best_beams_of_its_prompts(
    method: str,
    settings: dict[str, Any],
    each: int,
    online: OnlineWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    written: list[list[Completion]] = []
    generate = InProcessEngine.generate

    def seen(self: InProcessEngine, requests: Sequence[Request], sampling: Sampling, *more: Any) -> list[Completion]:
        assert sampling.num_beams == 4
        written.append(generate(self, requests, sampling, *more))
        return written[-1]

    monkeypatch.setattr(InProcessEngine, "generate", seen)
    sampling = {"maxNewTokens": 8, "numBeams": 4}
    changes = {"method": {method: COMMON | settings | {"sampling": sampling}}, "training.maxSteps": 2}
    with caplog.at_level(logging.WARNING):
        online.train(online.plan(method, changes, evaluated=False), tmp_path / "run")
    answers = [tuple(one.ids) for one in written[0]]
    groups = [answers[start : start + each] for start in range(0, len(answers), each)]
    assert all(len(set(group)) == each for group in groups)
    assert all(abs(kl) < 1e-5 for kl in online.curve(tmp_path / "run", "kl")[:1]), "log-probabilities are the policy's"
    said = [message for message in caplog.messages if "likeliest answers of a search" in message]
    assert len(said) == 1
    assert said[0].startswith(f"spec.method.{method}.sampling: ")
