"""A reward model that is an adapter of the policy's own base is held on it, and scores as it does on its own."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune_api.plan import RunPlan
from finetune_api.spec import Quantization
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.engine import Engine
from finetune_trainers.errors import UserError
from finetune_trainers.online import judges
from finetune_trainers.online.judges import add_judges, judge_parts, judges_of
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.rewards import Episode
from finetune_trainers.rewards.judge import Judge, OnPolicy, load_judge
from finetune_trainers.rewards.weighted import NamedScorer, WeightedRewards
from finetune_trainers.rollout.vllm_weights import policy_weights
from finetune_trainers.rollout.zero3 import inside, is_split
from finetune_trainers.worker import load
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import LORA as OF_REWARD
from tests.trainers.judged_world import JudgedWorld, zero
from tests.trainers.online.online_world import COMMON, LORA, METHODS, OnlineWorld, write_prompts

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

FIELD = "spec.method.grpo.rewards[0].model"
# fewer layers than the reward model adapts
NARROW = {"tuning": {"lora": {"rank": 8, "alpha": 64, "targetModules": ["q_proj", "v_proj"]}}}
WAYS: dict[str, dict[str, Any]] = {
    "torch": LORA,
    "other layers": NARROW,
    "bf16": LORA | {"training.precision": "bf16"},
    "zero 2": LORA | zero(2),
    "zero 2, bf16": LORA | zero(2) | {"training.precision": "bf16"},
    "zero 3": LORA | zero(3),
}


class World:
    """Reward models of one base, and policies on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.judged = JudgedWorld.at(folder / "world")
        for name, tuning in (("lora", OF_REWARD), ("full", {})):
            steps = {"training.maxSteps": 6, "training.learningRate": 0.01}
            self.judged.train(self.judged.plan("reward", steps | tuning), folder / name)
        write_prompts(folder / "world" / "prompts.jsonl", 20)
        self.online = OnlineWorld(self.judged.world)

    @property
    def adapter(self) -> Path:
        return self.folder / "lora" / "artifact"

    def plan(self, changes: dict[str, Any], *sources: Path, method: str = "grpo", **settings: Any) -> RunPlan:
        rewards = [
            {"model": {"source": source.as_uri()}, "name": f"model{number}"}
            for number, source in enumerate(sources or [self.adapter])
        ]
        wanted = METHODS[method][method] | COMMON | {"rewards": rewards} | settings
        return self.online.plan(method, {"method": {method: wanted}, "training.maxSteps": 4} | changes, evaluated=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("judges"))


def loaded(plan: RunPlan, world: World, workdir: Path) -> tuple[Engine, PreparedRun, SingleProcessContext]:
    prepared = world.online.world.prepare(plan, workdir)
    context = SingleProcessContext(plan, workdir)
    return load(plan, prepared, context)[1], prepared, context


def judge(plan: RunPlan, prepared: PreparedRun, context: Any, index: int = 0, on: OnPolicy | None = None) -> Judge:
    assert plan.method.online is not None
    reward = plan.method.online.rewards[index].model
    assert reward is not None
    return load_judge(reward, FIELD, plan, prepared, context, on)


def episodes(num: int = 5) -> list[Episode]:
    return [Episode([{"role": "user", "content": "the cat"}], "more and " * count) for count in range(1, num + 1)]


def scramble(module: nn.Module) -> None:
    """The policy's adapters, and a critic's, say something."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name and "judge_" not in name and not hasattr(parameter, "ds_id"):
                parameter.normal_(std=0.5)


@pytest.mark.parametrize(("method", "way"), [*(("grpo", way) for way in WAYS), ("ppo", "torch"), ("ppo", "zero 3")])
def test_it_scores_as_on_its_own_to_the_bit_whatever_the_policy_has_learned(
    method: str, way: str, world: World, tmp_path: Path
) -> None:
    plan = world.plan(WAYS[way], world.adapter, method=method)
    engine, prepared, context = loaded(plan, world, tmp_path)
    engine.begin_step(0.0, 0.0)
    on_policy = judges_of(engine.module)
    assert list(on_policy) == [0]
    scramble(engine.module)
    engine.module.train()
    found = judge(plan, prepared, context, on=on_policy[0]).score(episodes())
    engine.close()
    alone = judge(plan, prepared, context).score(episodes())
    assert len({round(value, 4) for value in alone.values if value is not None}) > 1
    assert found == alone
    assert engine.module.training


def test_each_of_several_has_scores_of_its_own(world: World, tmp_path: Path) -> None:
    other = shutil.copytree(world.adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, other / "adapter_model.safetensors")
    plan = world.plan(LORA, world.adapter, other, world.folder / "full" / "artifact")
    engine, prepared, context = loaded(plan, world, tmp_path / "run")
    on_policy = judges_of(engine.module)
    assert list(on_policy) == [0, 1], "the third is a whole model"
    alone = [judge(plan, prepared, context, index).score(episodes()) for index in (0, 1)]
    assert alone[0] != alone[1]
    assert [judge(plan, prepared, context, index, on_policy[index]).score(episodes()) for index in (0, 1)] == alone


@pytest.mark.parametrize("way", ["torch", "other layers", "zero 3"])
def test_nothing_of_it_learns_or_is_written_and_the_policy_is_the_same(way: str, world: World, tmp_path: Path) -> None:
    plan = world.plan(WAYS[way])
    engine, _, _ = loaded(plan, world, tmp_path / "with")
    assert plan.method.online is not None
    of_judge = [name for name, _ in engine.module.named_parameters() if "judge_0" in name.split(".")]
    assert len(of_judge) > 2
    learning = {name for name, parameter in inside(engine.module).named_parameters() if parameter.requires_grad}
    assert learning
    assert not any("judge_0" in name for name in learning)
    weights = {
        name: tensor.clone()
        for name, tensor in policy_weights(engine.module, torch.float32, judge_parts(plan.method.online))
    }
    engine.close()

    bare = world.online.plan("grpo", WAYS[way], evaluated=False)
    other, _, _ = loaded(bare, world, tmp_path / "without")
    assert learning == {name for name, parameter in inside(other.module).named_parameters() if parameter.requires_grad}
    plain = dict(policy_weights(other.module, torch.float32))
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())
    other.close()


def saving(plan: RunPlan, folder: Path) -> tuple[RunPlan, Storage]:
    assert plan.checkpoint is not None
    where = {"uri": f"file://{folder}/checkpoints"}
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update=where)})
    return plan, open_storage(where["uri"])


@pytest.mark.parametrize(("method", "way"), [("ppo", "torch"), ("grpo", "zero 3")])
def test_a_run_learns_what_it_learns_beside_a_whole_reward_model_also_when_it_goes_on(
    method: str, way: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"passes": 1, "miniBatches": 2}
    changes = WAYS[way] | {"checkpoint": {"everySteps": 2, "keepLast": 8}}
    plan, storage = saving(world.plan(changes, method=method, **settings), tmp_path)
    world.online.train(plan, tmp_path / "whole")
    manifest = find_newest(storage).manifest
    assert manifest is not None
    assert not [one.name for one in manifest.intent.tensors if "judge" in one.name]
    for checkpoint, listing in listed(storage).items():
        if checkpoint.step > 2:
            storage.delete(list(listing.sizes))
    world.online.train(plan, tmp_path / "rest")
    monkeypatch.setattr(judges, "misfit", lambda *_: "is not wanted here")
    world.online.train(world.plan(WAYS[way], method=method, **settings), tmp_path / "beside")
    for figure in ("loss", "reward", "grad_norm"):
        curve = world.online.curve(tmp_path / "whole", figure)
        assert len(curve) == 4
        assert world.online.curve(tmp_path / "rest", figure) == curve[2:]
        assert world.online.curve(tmp_path / "beside", figure) == curve
    artifacts = [world.online.artifact(tmp_path / name) for name in ("whole", "rest", "beside")]
    assert artifacts[0].keys() == artifacts[1].keys() == artifacts[2].keys()
    assert not any("judge" in name for name in artifacts[0])
    for name, tensor in artifacts[0].items():
        assert all(torch.equal(other[name], tensor) for other in artifacts[1:]), name


def copied_base(world: World, tmp_path: Path, **config: Any) -> Path:
    """The policy's model in another folder."""
    folder = shutil.copytree(world.online.world.model, tmp_path / "base")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | config))
    return folder


@pytest.mark.parametrize(
    ("which", "config", "said"),
    [
        ("lora", {"transformers_version": "0"}, "is held as an adapter on the policy's base"),
        (
            "lora",
            {"rms_norm_eps": 0.5},
            "is loaded beside the policy: it is an adapter of another model than the policy's",
        ),
        ("full", {}, "is loaded beside the policy: it is a whole model"),
    ],
)
def test_the_log_says_where_it_is_and_why(
    which: str, config: dict[str, Any], said: str, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = copied_base(world, tmp_path, **config)
    plan = world.plan(LORA | {"model.source": base.as_uri()}, world.folder / which / "artifact")
    with caplog.at_level(logging.INFO):
        engine, _, _ = loaded(plan, world, tmp_path / "run")
    [found] = [message for message in caplog.messages if message.startswith(FIELD)]
    assert said in found
    assert list(judges_of(engine.module)) == ([0] if "held" in said else [])


def test_a_policy_without_a_frozen_base_as_it_is_stored_has_no_room_for_it(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = world.plan({})
    assert plan.tuning.lora is None
    of_lora = world.plan(LORA)
    assert of_lora.tuning.lora is not None
    lora = of_lora.tuning.lora.model_copy(update={"quantization": Quantization.NF4})
    rounded = of_lora.model_copy(update={"tuning": of_lora.tuning.model_copy(update={"lora": lora})})
    prepared = world.online.world.prepare(plan, tmp_path).model
    with caplog.at_level(logging.INFO):
        for one in (plan, rounded):
            add_judges(nn.Linear(1, 1), one, prepared, SingleProcessContext(one, tmp_path))
    found = [message.partition("policy: it ")[2] for message in caplog.messages if message.startswith(FIELD)]
    assert found == [
        "needs a frozen base, which a policy without tuning.lora has not",
        "needs its base as it is stored, and tuning.lora.quantization rounds the policy's",
    ]


def test_layers_that_its_configuration_names_and_it_has_no_weights_for_are_left_alone(
    world: World, tmp_path: Path
) -> None:
    other = shutil.copytree(world.adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    config["target_modules"].append("lm_head")  # which a model that gives scores has not
    (other / "adapter_config.json").write_text(json.dumps(config))
    plan = world.plan(LORA, other)
    engine, prepared, context = loaded(plan, world, tmp_path / "run")
    on_policy = judges_of(engine.module)
    assert list(on_policy) == [0]
    alone = judge(plan, prepared, context).score(episodes())
    assert judge(plan, prepared, context, on=on_policy[0]).score(episodes()) == alone


def test_an_adapter_with_other_weights_than_its_configuration_says_is_refused(world: World, tmp_path: Path) -> None:
    broken = shutil.copytree(world.adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in weights if ".lora_A." in name)
    save_file(weights | {name: weights[name][1:].clone()}, broken / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has weights in other places, or of another shape, than its") as caught:
        loaded(world.plan(LORA, broken), world, tmp_path / "run")
    [problem] = caught.value.problems
    assert problem.path == f"{FIELD}.source"


class Among(SingleProcessContext):
    """A rank among others, of whom one makes `most` passes."""

    most = 3

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.most]


def test_in_a_split_policy_all_ranks_make_as_many_passes_also_one_without_answers(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = world.plan(WAYS["zero 3"])
    engine, prepared, _ = loaded(plan, world, tmp_path)
    [on_policy] = judges_of(engine.module).values()
    assert is_split(on_policy.module)
    one = judge(plan, prepared, Among(plan, tmp_path), on=on_policy)
    passes: list[int] = []
    read = one._read

    def counted(**inputs: Any) -> Any:
        passes.append(inputs["input_ids"].shape[1])
        return read(**inputs)

    monkeypatch.setattr(one, "_read", counted)
    rewards = WeightedRewards([NamedScorer("model", FIELD, 1.0, one, in_this_thread=True)])
    assert len(rewards.score(episodes())) == 5
    assert len(passes) == 3
    assert rewards.score([]) == []
    assert passes[1:] == [1] * 5
    engine.close()
