"""Full-parameter PPO under ZeRO-3: no rank holds all of policy, critic, reference or reward models, and two ranks learn
what one process with whole models learns."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.plan import RunPlan
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.storage.opening import open_storage
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import LORA as OF_REWARD
from tests.trainers.judged_world import JudgedWorld
from tests.trainers.online.online_world import COMMON, OnlineWorld, write_prompts
from tests.trainers.two_ranks import run_two_ranks

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

STEPS = 9
AT_ONCE = {"param_persistence_threshold": 0, "max_live_parameters": 0, "max_reuse_distance": 0}
"""DeepSpeed lets go of what it has gathered, however little that is."""
TWO_RANKS: dict[str, Any] = {
    "cluster": {"workers": {"replicas": 2, "cpus": 1}},
    "deepspeed": {
        "zeroStage": 3,
        "config": {"zero_optimization": {f"stage3_{name}": value for name, value in AT_ONCE.items()}},
    },
}


@dataclass(frozen=True)
class Runs:
    """The same run of one rank in `one`, and of two in `two`."""

    online: OnlineWorld
    one: Path
    two: Path


def begin(folder: Path) -> OnlineWorld:
    """Two reward models, prompts, and of prompts to evaluate on one more than two ranks share evenly."""
    judged = JudgedWorld.at(folder / "world")
    for name, tuning in (("whole", {}), ("adapter", OF_REWARD)):
        steps = {"training.maxSteps": 2, "training.learningRate": 0.01}
        judged.train(judged.plan("reward", steps | tuning, evaluated=False), folder / name)
    write_prompts(folder / "world" / "prompts.jsonl", 20)
    write_prompts(folder / "world" / "eval-prompts.jsonl", 3, seed=1)
    return OnlineWorld(judged.world)


def plan(online: OnlineWorld, rewards: Path, workdir: Path, ranks: dict[str, Any]) -> RunPlan:
    """All that PPO has: a critic that begins alone and learns at its own rate, a price of KL, a stop."""
    ppo = COMMON | {
        "rewards": [
            {"model": {"source": (rewards / name / "artifact").as_uri()}, "name": name} for name in ("whole", "adapter")
        ],
        "passes": 3,
        "miniBatches": 1,
        "kl": {"coefficient": 0.02},
        "stopKl": 0.003,
        "critic": {"warmupIterations": 1, "learningRate": 0.002},
    }
    changes = {
        "method": {"ppo": ppo},
        "training.maxSteps": STEPS,
        "training.learningRate": 0.005,
        "training.schedule": "constant",
        "training.evalEverySteps": STEPS,
        "checkpoint": {"everySteps": STEPS},
    }
    planned = online.plan("ppo", changes | ranks)
    assert planned.checkpoint is not None
    where = planned.checkpoint.model_copy(update={"uri": f"file://{workdir}/checkpoints"})
    return planned.model_copy(update={"checkpoint": where})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("split-roles")
    found = Runs(begin(folder), folder / "one", folder / "two")
    found.online.train(plan(found.online, folder, found.one, {}), found.one)
    found.online.world.prepare(plan(found.online, folder, found.two, TWO_RANKS), found.two)
    run_two_ranks("tests.trainers.online.split_worker", found.two)
    return found


def test_two_ranks_learn_what_one_learns(runs: Runs) -> None:
    figures = ("reward", "reward/whole", "reward/adapter", "kl", "values", "loss", "value_loss", "approx_kl")
    for figure in (*figures, "response_length", "eval_reward"):
        one, two = (runs.online.curve(folder, figure) for folder in (runs.one, runs.two))
        assert len(set(one)) > 1, f"{figure} of one value would agree with anything"
        assert two == pytest.approx(one, abs=1e-4), figure
    found, wanted = runs.online.artifact(runs.two), runs.online.artifact(runs.one)
    assert found.keys() == wanted.keys()
    assert all(found[name].allclose(tensor, atol=1e-3) for name, tensor in wanted.items())


def test_the_critic_begins_alone_and_steps_beyond_the_stop_are_left_out(runs: Runs) -> None:
    """Otherwise the two would agree on less than there is."""
    learned = [figures for figures in runs.online.figures(runs.two) if "loss" in figures]
    assert [figures["approx_kl"] < 1e-6 for figures in learned[:4]] == [True] * 4
    assert max(runs.online.curve(runs.two, "steps_left_out")) > 0
    assert len(learned) < STEPS


@pytest.mark.parametrize("role", ["policy and critic", "reference", "whole", "adapter"])
def test_of_each_model_a_rank_holds_half(role: str, runs: Runs) -> None:
    for rank in range(2):
        looks = json.loads((runs.two / f"held-{rank}.json").read_text())
        assert len(looks) == STEPS
        for look in looks:
            own, everything = look[role]
            assert own == pytest.approx(everything / 2, rel=0.01)


def test_what_never_learns_is_in_no_checkpoint(runs: Runs) -> None:
    saved = []
    for folder in (runs.one, runs.two):
        manifest = find_newest(open_storage(f"file://{folder}/checkpoints")).manifest
        assert manifest is not None
        saved.append({tensor.name: tensor.shape for tensor in manifest.intent.tensors})
    assert saved[0] == saved[1]
