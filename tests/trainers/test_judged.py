"""Learning from judged answers, end to end: rows, batches, steps, figures, artifact, and going on after a stop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from finetune_api.progress import Progress
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.evaluation import evaluating
from finetune_trainers.methods.building import build_method
from finetune_trainers.worker import load
from tests.trainers.judged_world import LORA, METHODS, JudgedWorld, zero

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

STEPS = {"training.maxSteps": 8, "training.learningRate": 0.003}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> JudgedWorld:
    return JudgedWorld.at(tmp_path_factory.mktemp("judged"))


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_what_the_judgements_say(
    method: str, tuning: dict[str, Any], judged: JudgedWorld, tmp_path: Path
) -> None:
    faster = {"training.learningRate": 0.02} if tuning else {}
    outcome = judged.train(judged.plan(method, STEPS | tuning | faster), tmp_path / "run")
    assert outcome.eval is not None
    before, after = outcome.eval.loss_before, outcome.eval.loss_after
    assert before is not None
    assert after is not None
    assert after < before
    margins = judged.curve(tmp_path / "run", "eval_rewards/margins")
    assert margins[-1] > margins[0]


@pytest.mark.parametrize("method", ["dpo", "smoothed dpo", "kto"])
def test_a_policy_that_is_its_reference_yet_is_as_likely_to_be_right_as_wrong(
    method: str, judged: JudgedWorld, tmp_path: Path
) -> None:
    outcome = judged.train(judged.plan(method, {"training.maxSteps": 1} | LORA), tmp_path / "run")
    assert outcome.eval is not None
    if method != "kto":
        assert outcome.eval.loss_before == pytest.approx(math.log(2), abs=1e-5)
    [before, _] = judged.curve(tmp_path / "run", "eval_rewards/margins")
    assert before == pytest.approx(0, abs=1e-5)
