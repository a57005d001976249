"""A critic that begins as the reward model says what that says, and what cannot be one is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from finetune_api.failures import FailureClass
from finetune_api.plan import RunPlan
from finetune_trainers.attention import forward_kwargs
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.batches import Batch
from finetune_trainers.errors import UserError
from finetune_trainers.methods.reward import Calibration
from finetune_trainers.models import load_model
from finetune_trainers.online.critic import add_critic
from finetune_trainers.online.critic_beginning import _line, check_beginning
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.rewards.judge import Judge, _calibrated, load_judge
from finetune_trainers.tuning import apply_tuning
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import JudgedWorld
from tests.trainers.online.online_world import COMMON, LORA, OnlineWorld, write_prompts

# PEFT and we ask transformers by names that are going to change
pytestmark = WHEN_TRAINING

TUNINGS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
PROMPT = [{"role": "user", "content": "which of two?"}]
ANSWER = "this one, since it is better"


class World:
    """Reward models, full and LoRA, of one base, and policies on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.judged = JudgedWorld.at(folder / "world")
        for name, tuning in TUNINGS.items():
            steps = {"training.maxSteps": 3, "training.learningRate": 0.01}
            self.judged.train(self.judged.plan("reward", steps | tuning), folder / name)
        write_prompts(folder / "world" / "prompts.jsonl", 20)
        self.online = OnlineWorld(self.judged.world)

    def plan(self, tuning: str, source: Path, begins_as: str = "reward", **reward: Any) -> RunPlan:
        weight = reward.pop("weight", 1.0)
        rewards = [{"model": {"source": source.as_uri(), **reward}, "weight": weight}]
        ppo = COMMON | {"rewards": rewards, "critic": {"beginsAs": begins_as}}
        changes = {"method": {"ppo": ppo}, "training.maxSteps": 2, **TUNINGS[tuning]}
        return self.online.plan("ppo", changes, evaluated=False)

    def prepared(self, plan: RunPlan, workdir: Path) -> PreparedRun:
        return self.online.world.prepare(plan, workdir)

    def artifact(self, name: str) -> Path:
        return self.folder / name / "artifact"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("critics"))


def value_at_the_end(plan: RunPlan, prepared: PreparedRun, judge: Judge) -> float:
    """Of the answer's last token, by the critic as it begins."""
    device = torch.device("cpu")
    assert plan.method.ppo is not None
    policy = apply_tuning(load_model(prepared.model, plan, device), plan)
    tuned = add_critic(policy, plan.method.ppo, plan, prepared, device)
    ids = judge._encode([_episode()])[0][0]
    batch = Batch(
        torch.tensor([ids]),
        torch.full((1, len(ids)), -100),
        torch.arange(len(ids))[None],
        torch.tensor([0, len(ids)], dtype=torch.int32),
        len(ids),
        0,
    )
    kwargs = forward_kwargs(batch)
    del kwargs["logits_to_keep"]
    tuned.model.eval()
    with torch.no_grad():
        return float(tuned.model(input_ids=batch.input_ids, values_at=torch.tensor([len(ids) - 1]), **kwargs)[0])


def _episode() -> Any:
    from finetune_trainers.rewards import Episode

    return Episode(PROMPT, ANSWER)


@pytest.mark.parametrize(
    ("tuning", "reward"), [("full", "full"), ("full", "lora"), ("lora", "lora")], ids=lambda name: str(name)
)
def test_its_first_word_is_the_reward_models_in_the_units_of_the_reward(
    world: World, tmp_path: Path, tuning: str, reward: str
) -> None:
    plan = world.plan(tuning, world.artifact(reward), weight=2.0)
    prepared = world.prepared(plan, tmp_path)
    source = plan.method.ppo.rewards[0].model  # type: ignore[union-attr]
    assert source is not None
    judge = load_judge(source, "spec.method.ppo.rewards[0].model", plan, prepared, SingleProcessContext(plan, tmp_path))
    [said] = judge.score([_episode()]).values
    assert said is not None
    assert abs(said) > 1e-3
    assert value_at_the_end(plan, prepared, judge) == pytest.approx(2.0 * said, abs=1e-4)


def test_a_run_of_ppo_begins_with_it_and_goes_through(world: World, tmp_path: Path) -> None:
    figures = {}
    for begins_as in ("reward", "policy"):
        plan = world.plan("lora", world.artifact("lora"), begins_as)
        world.online.train(plan, tmp_path / begins_as)
        figures[begins_as] = world.online.curve(tmp_path / begins_as, "values")[0]
    assert figures["policy"] == 0.0
    assert abs(figures["reward"]) > 1e-3


def test_with_lora_a_whole_reward_model_is_refused_before_workers_start(world: World, tmp_path: Path) -> None:
    outcome = world.online.world.train(world.plan("lora", world.artifact("full")), tmp_path)
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    assert "rewards[0].model.source: is a whole model, and with tuning.lora the critic" in outcome.failure.message
    assert not (tmp_path / "prepared.json").exists()


def test_an_adapter_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    plan = world.plan("lora", world.artifact("lora"))
    model = world.prepared(plan, tmp_path).model
    check_beginning(plan, model)
    with pytest.raises(UserError, match="is an adapter of another model than the policy's"):
        check_beginning(plan, model.model_copy(update={"folder": str(tmp_path), "digest": "another"}))


def test_an_adapter_is_not_merged_into_parts_of_a_model(world: World, tmp_path: Path) -> None:
    plan = world.plan("full", world.artifact("lora"))
    model = world.prepared(plan, tmp_path).model
    split = plan.model_copy(update={"deepspeed": plan.deepspeed.model_copy(update={"zero_stage": 3})})
    with pytest.raises(UserError, match=r"is an adapter, which is not merged .* \(zeroStage 3\)"):
        check_beginning(split, model)


def test_a_reward_model_with_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.artifact("full"), other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"Q"', '"\u0120\u0120\u0120"'))
    plan = world.plan("full", other)
    model = world.prepared(world.plan("full", world.artifact("full")), tmp_path).model
    with pytest.raises(UserError, match="has another tokenizer than the policy, whose tokens the critic reads"):
        check_beginning(plan, model)


@pytest.mark.parametrize("squash", [False, True])
def test_values_are_in_the_units_of_the_reward_around_an_average_score(squash: bool) -> None:
    calibration = Calibration(mean=5.0, scale=2.0, squash=squash, measured_on="eval")
    gain, offset = _line(cast(Any, SimpleNamespace(calibration=calibration)), 3.0)
    for score in (4.999, 5.0, 5.001):
        assert gain * score + offset == pytest.approx(3.0 * _calibrated(score, calibration), abs=1e-6)
