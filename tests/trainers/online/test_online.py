"""Learning from what the model itself writes, end to end: rollouts, rewards, steps, figures, artifact, going on."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.failures import FailureClass
from finetune_api.plan import RunPlan
from finetune_api.spec import Precision
from finetune_trainers.checkpoint.exports import ExportOptions, export_checkpoint
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.engine import Engine
from finetune_trainers.methods import Method
from finetune_trainers.methods.building import build_method
from finetune_trainers.online.episodes import Experience
from finetune_trainers.online.models import Models
from finetune_trainers.ray_workers import RayWorkers
from finetune_trainers.rl.logprobs import TokenStats
from finetune_trainers.rollout.in_process import InProcessEngine
from finetune_trainers.worker import load
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import zero
from tests.trainers.online.online_world import COMMON, LORA, METHODS, OnlineWorld
from tests.trainers.parity_group import train_all

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.training, *WHEN_TRAINING]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("online"))


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_policy_learns_to_write_what_is_rewarded(
    method: str, tuning: dict[str, Any], online: OnlineWorld, tmp_path: Path
) -> None:
    """Twice as much and more, whatever the seed: what hardly learns would hang on how a processor rounds."""
    settings = METHODS[method][method] | ({"passes": 2, "miniBatches": 1} if method == "ppo" else {})
    if method == "ppo" and tuning:
        settings |= {"kl": {"coefficient": 0.002}}  # ten times the price holds these adapters where they are
    steps = {"training.maxSteps": (40 if tuning else 30) * settings.get("passes", 1), "training.schedule": "constant"}
    rate = {"grpo": 0.01, "ppo": 0.005}[method] if tuning else 0.003
    changes = {"method": {method: settings}, "training.learningRate": rate}
    outcome = online.train(online.plan(method, changes | steps | tuning), tmp_path / "run")
    rewards = online.curve(tmp_path / "run", "reward")
    assert sum(rewards[-8:]) > 1.4 * sum(rewards[:8])
    assert outcome.eval is not None
    assert outcome.eval.reward_before is not None
    assert outcome.eval.reward_after is not None
    assert outcome.eval.reward_after > outcome.eval.reward_before
    assert outcome.eval.loss_after == -outcome.eval.reward_after


def begun(plan: RunPlan, online: OnlineWorld, workdir: Path) -> tuple[Method, Engine]:
    """A method before its first step, as a worker has it."""
    prepared = online.world.prepare(plan, workdir)
    context = SingleProcessContext(plan, workdir)
    _, engine = load(plan, prepared, context)
    method = build_method(plan, prepared, engine.module, context)
    engine.begin_step(0.0, 0.0)
    return method, engine


def documents(batch: Batch) -> list[tuple[list[int], list[int], Tensor]]:
    """(prompt, answer, advantages of the answer's tokens) of each rollout of a batch."""
    found, seen = [], 0
    assert isinstance(batch, Experience)
    assert batch.advantages is not None
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids, num = batch.input_ids[0, start:end].tolist(), int((batch.labels[0, start:end] != IGNORED).sum())
        found.append((ids[:-num], ids[-num:], batch.advantages[seen : seen + num]))
        seen += num
    return found


def log_probs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(answer)[:, None])[:, 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_the_first_step_has_the_gradient_of_the_formula(aggregation: str, online: OnlineWorld, tmp_path: Path) -> None:
    settings = METHODS["grpo"]["grpo"] | {"aggregation": aggregation}
    plan = online.plan("grpo", {"method": {"grpo": settings}})
    method, engine = begun(plan, online, tmp_path)
    batches = method.step(0)
    method.close()
    assert batches is not None
    for batch in batches.micro_batches:
        engine.backward(method.loss(engine.module, batch).total, batches.divisor)

    model = AutoModelForCausalLM.from_pretrained(online.world.model)
    tokenizer = AutoTokenizer.from_pretrained(online.world.model)
    rollouts = [one for batch in batches.micro_batches for one in documents(batch)]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for _, answer, _ in rollouts]
    rewards = [text.count("e") / max(len(text), 1) for text in texts]
    groups = defaultdict(list)
    for (prompt, _, _), reward in zip(rollouts, rewards, strict=True):
        groups[tuple(prompt)].append(reward)
    assert {len(group) % 4 for group in groups.values()} == {0}
    num_tokens = sum(len(answer) for _, answer, _ in rollouts)
    loss = torch.zeros(())
    for (prompt, answer, advantages), reward in zip(rollouts, rewards, strict=True):
        group = torch.tensor(groups[tuple(prompt)])
        advantage = (reward - group.mean()) / (group.std() + 1e-4)
        assert advantages == pytest.approx(advantage.expand(len(answer)), abs=1e-5)
        gains = advantage * log_probs(model, prompt, answer)
        divisor = {"token": num_tokens, "sequence": 16 * len(answer), "constant": 16 * 12}[aggregation]
        loss = loss - gains.sum() / divisor
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        found = engine.module.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_policy_said_as_it_wrote_is_asked_again_where_it_was_rounded(
    precision: str, online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, _ = begun(online.plan("ppo", {"training.precision": precision}), online, tmp_path)
    asked: list[Batch] = []
    stats = Models.stats

    def noted(models: Models, batch: Batch) -> TokenStats:
        asked.append(batch)
        return stats(models, batch)

    monkeypatch.setattr(Models, "stats", noted)
    batches = method.step(0)
    method.close()
    assert batches is not None
    assert bool(asked) is (precision == "bf16")
    for batch in batches.micro_batches:
        assert isinstance(batch, Experience)
        assert batch.old_log_probs is not None
        with torch.no_grad():
            again = stats(method._parts.models, batch).log_probs  # type: ignore[attr-defined]
        torch.testing.assert_close(batch.old_log_probs, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"tuning": {"lora": LORA["tuning"]["lora"] | {"dropout": 0.5}}}, {"model.source": "with dropout"}],
    ids=["of the adapters", "of attention"],
)
def test_the_policy_that_learns_is_the_one_that_wrote_whatever_dropout_there_would_be(
    changes: dict[str, Any], online: OnlineWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "model.source" in changes:
        model = AutoModelForCausalLM.from_pretrained(online.world.model, attention_dropout=0.5)
        shutil.copytree(online.world.model, tmp_path / "model")
        model.save_pretrained(tmp_path / "model")
        changes = {"model.source": (tmp_path / "model").as_uri()}
    with caplog.at_level(logging.INFO):
        method, engine = begun(online.plan("ppo", changes), online, tmp_path / "run")
    batches = method.step(0)
    method.close()
    assert batches is not None
    assert engine.module.training
    for batch in batches.micro_batches:
        clipped, approx_kl, *_ = method.loss(engine.module, batch).sums.tolist()
        assert clipped == 0
        assert approx_kl == pytest.approx(0, abs=1e-6)
    assert sum("Dropout of up to 0.5 is off" in message for message in caplog.messages) == 1


def test_before_the_critic_has_learned_tokens_are_worth_what_the_reward_leaves_them(
    online: OnlineWorld, tmp_path: Path
) -> None:
    settings = METHODS["ppo"]["ppo"] | {"whitenAdvantages": False, "gaeLambda": 0.9, "missingEosPenalty": 0.5}
    method, _ = begun(online.plan("ppo", {"method": {"ppo": settings}} | LORA), online, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(online.world.model)
    batches = method.step(0)
    method.close()
    assert batches is not None
    for batch in batches.micro_batches:
        assert isinstance(batch, Experience)
        assert batch.old_values is not None
        assert not batch.old_values.any()
        for _, answer, advantages in documents(batch):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            ended = answer[-1] == tokenizer.eos_token_id
            reward = text.count("e") / max(len(text), 1) - (0.0 if ended else 0.5)
            wanted = [reward * 0.9**left for left in reversed(range(len(answer)))]
            assert advantages.tolist() == pytest.approx(wanted, abs=1e-5)


def saving(plan: RunPlan, folder: Path) -> tuple[RunPlan, Storage]:
    """`plan` with its checkpoints below `folder`, and where they are."""
    assert plan.checkpoint is not None
    where = {"uri": f"file://{folder}/checkpoints"}
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update=where)})
    return plan, open_storage(where["uri"])


@pytest.mark.parametrize("way", ["torch", "torch, lora", "zero 2", "zero 3", "zero 3, lora"])
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_two_and_two_iterations_are_four_to_the_bit(method: str, way: str, online: OnlineWorld, tmp_path: Path) -> None:
    ways = {"torch": {}, "torch, lora": LORA, "zero 2": zero(2), "zero 3": zero(3), "zero 3, lora": zero(3) | LORA}
    adaptive = {"target": 0.5, "coefficient": 0.1, "horizon": 100}
    settings = {
        "grpo": METHODS["grpo"]["grpo"] | {"passes": 2, "klCoefficient": 0.1, "dynamicSampling": 2},
        "ppo": METHODS["ppo"]["ppo"] | {"passes": 1, "kl": adaptive, "normalizeRewards": True},
    }
    changes = {
        "method": {method: settings[method]},
        "training.maxSteps": 8,
        "checkpoint": {"everySteps": 3, "keepLast": 8},
        **ways[way],
    }
    plan, storage = saving(online.plan(method, changes, evaluated=False), tmp_path)
    online.train(plan, tmp_path / "whole")
    saved = sorted(checkpoint.step for checkpoint in listed(storage))
    assert saved == [4, 6], "due after 3 and 6, and taken between iterations"
    for checkpoint, listing in listed(storage).items():
        if checkpoint.step == 6:
            storage.delete(list(listing.sizes))
    online.train(plan, tmp_path / "rest")
    for figure in ("loss", "reward", "grad_norm"):
        assert online.curve(tmp_path / "rest", figure) == online.curve(tmp_path / "whole", figure)[4:]
    whole, rest = online.artifact(tmp_path / "whole"), online.artifact(tmp_path / "rest")
    assert whole.keys() == rest.keys()
    for name, tensor in whole.items():
        assert torch.equal(rest[name], tensor), name


@pytest.mark.ray
def test_two_workers_learn_what_one_learns(
    online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rollout is the same, whoever writes it; so are the steps, but for the order in which sums are taken."""
    settings = {
        "grpo": METHODS["grpo"]["grpo"] | {"passes": 2, "klCoefficient": 0.1},
        "ppo": METHODS["ppo"]["ppo"] | {"miniBatches": 1},
    }
    changes = {method: {"method": {method: settings[method]}, "training.maxSteps": 6} for method in METHODS}
    two = {"cluster": {"workers": {"replicas": 2, "cpus": 1}}}
    plans = {method: online.plan(method, changes[method] | two | zero(2) | LORA) for method in METHODS}
    prepared = None
    for method, plan in plans.items():
        (tmp_path / "two" / method).mkdir(parents=True)
        prepared = online.world.prepare(plan, tmp_path / "two" / method)
    assert prepared is not None
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    with RayWorkers(plans["grpo"], train_all) as ray:
        ray.run(prepared, tmp_path / "two", lambda future: future.result())
    for method in METHODS:
        online.train(online.plan(method, changes[method] | zero(2) | LORA), tmp_path / method)
        wanted = {"reward", "response_length", "loss", "grad_norm", "entropy", "approx_kl", "clip_fraction", "kl"}
        for figure in wanted | ({"value_loss", "values"} if method == "ppo" else set()):
            one, both = (online.curve(folder, figure) for folder in (tmp_path / method, tmp_path / "two" / method))
            assert len(one) in (3, 6), f"{figure} is there, for each step or each iteration"
            assert both == pytest.approx(one, abs=1e-4, rel=1e-3), (method, figure)


def test_answers_of_an_evaluation_are_kept_for_people_as_they_were_written_and_judged(
    online: OnlineWorld, tmp_path: Path
) -> None:
    online.train(online.plan("ppo", {"training.maxSteps": 4}), tmp_path / "run")
    lines = (online.world.folder / "eval-prompts.jsonl").read_text().splitlines()
    asked = [f"user: {json.loads(line)['prompt']}" for line in lines]
    logged = zip((0, 4), online.curve(tmp_path / "run", "eval_reward"), strict=True)
    for step, mean in logged:
        rows = samples_of(tmp_path / "run", step)
        assert [row["prompt"] for row in rows] == asked
        for row in rows:
            assert row["reward"] == pytest.approx(row["answer"].count("e") / max(len(row["answer"]), 1))
        assert {type(row["ended"]) for row in rows} == {bool}
        assert mean == pytest.approx(sum(row["reward"] for row in rows) / len(rows))


def samples_of(run: Path, step: int) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (run / "samples" / f"step-{step:06}.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_an_answer_without_a_reward_has_none_in_what_people_read(online: OnlineWorld, tmp_path: Path) -> None:
    call = {"call": "tests.trainers.online.scores:knows_short_ones", "settings": {"longest": 4}}
    settings = COMMON | {"groupSize": 4, "rewards": [{"function": call}]}
    online.train(online.plan("grpo", {"method": {"grpo": settings}, "training.maxSteps": 1}), tmp_path / "run")
    rows = samples_of(tmp_path / "run", 0)
    num_words = [len(row["prompt"].removeprefix("user: ").split()) for row in rows]
    assert [row["reward"] for row in rows] == [1.0 if num <= 4 else None for num in num_words]
    assert {row["reward"] for row in rows} == {1.0, None}


def test_no_more_rollouts_are_written_at_once_than_have_room(
    online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of two layers with two heads of 16 channels in fp32 take 512 bytes a token. An answer has 12, a
    prompt 6 and more."""
    rows: list[int] = []
    forward = InProcessEngine._forward

    def noted(engine: InProcessEngine, ids: Any, *others: Any) -> Tensor:
        rows.append(len(ids))
        return forward(engine, ids, *others)

    monkeypatch.setattr(InProcessEngine, "_forward", noted)
    plan = online.plan("grpo", {"training.maxSteps": 2}, evaluated=False)
    online.train(plan, tmp_path / "all")
    assert max(rows) == 16
    rows.clear()
    monkeypatch.setattr("finetune_trainers.online.building.memory_of", lambda context: 4 * 512 * 100)
    online.train(plan, tmp_path / "few")
    assert 1 < max(rows) <= 100 // (6 + 12)
    assert online.curve(tmp_path / "few", "reward") == pytest.approx(online.curve(tmp_path / "all", "reward"))


def test_a_policy_that_strays_too_far_ends_the_run_before_it_learns_more(online: OnlineWorld, tmp_path: Path) -> None:
    settings = COMMON | {"groupSize": 4, "maxKl": 1e-3}
    steps = {"training.maxSteps": 20, "training.learningRate": 0.05}
    outcome = online.world.train(online.plan("grpo", {"method": {"grpo": settings}} | steps), tmp_path / "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.KL_DIVERGED
    assert "maxKl" in outcome.failure.message


def test_the_artifact_of_ppo_is_the_policy_alone(online: OnlineWorld, tmp_path: Path) -> None:
    online.train(online.plan("ppo", {"training.maxSteps": 4} | LORA), tmp_path / "run")
    names = online.artifact(tmp_path / "run")
    assert names
    assert not [name for name in names if "critic" in name or "value" in name]
    config = json.loads((tmp_path / "run/artifact/adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_a_checkpoint_of_ppo_is_exported_as_the_policy_alone(
    tuning: dict[str, Any], online: OnlineWorld, tmp_path: Path
) -> None:
    changes = {"training.maxSteps": 4, "checkpoint": {"everySteps": 4}} | tuning
    plan, storage = saving(online.plan("ppo", changes, evaluated=False), tmp_path)
    online.train(plan, tmp_path / "run")
    manifest = find_newest(storage).manifest
    assert manifest is not None
    options = ExportOptions(dtype=Precision.FP32, base=None if tuning else online.world.model)
    export_checkpoint(storage, manifest, str(tmp_path / "out"), "hf", options)
    found = {key: one for file in (tmp_path / "out").glob("*.safetensors") for key, one in load_file(file).items()}
    wanted = online.artifact(tmp_path / "run")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_steps_beyond_the_stop_of_an_iteration_change_nothing(online: OnlineWorld, tmp_path: Path) -> None:
    settings = METHODS["ppo"]["ppo"] | {"passes": 4, "miniBatches": 1, "stopKl": 1e-9}
    changes = {"method": {"ppo": settings}, "training.maxSteps": 4, "training.learningRate": 0.01}
    online.train(online.plan("ppo", changes), tmp_path / "run")
    steps = [figures for figures in online.figures(tmp_path / "run") if "learning_rate" in figures]
    learned = {"loss", "grad_norm", "approx_kl", "clip_fraction", "entropy", "value_loss", "policy_loss"}
    assert [learned & step.keys() for step in steps] == [learned, learned, set(), set()], "no zeros that nobody counted"
    assert [step["steps_left_out"] for step in steps] == [0, 0, 1, 2]


def test_a_step_may_be_of_one_answer_of_one_token(online: OnlineWorld, tmp_path: Path) -> None:
    one = {"passes": 1, "miniBatches": 1, "sampling": {"maxNewTokens": 1}, "kl": {"target": 6, "horizon": 10}}
    sizes = {"training.globalBatchSize": 1, "training.microBatchSize": 1, "training.maxSteps": 2}
    plan = online.plan("ppo", {"method": {"ppo": METHODS["ppo"]["ppo"] | one}} | sizes, evaluated=False)
    online.train(plan, tmp_path / "run")
    assert len(online.curve(tmp_path / "run", "loss")) == 2
    assert online.curve(tmp_path / "run", "explained_variance") == []


def test_an_iteration_may_be_of_more_rollouts_than_the_horizon_of_the_price(
    online: OnlineWorld, tmp_path: Path
) -> None:
    settings = METHODS["ppo"]["ppo"] | {"passes": 1, "miniBatches": 4, "kl": {"target": 6, "horizon": 10}}
    plan = online.plan("ppo", {"method": {"ppo": settings}, "training.maxSteps": 8}, evaluated=False)
    online.train(plan, tmp_path / "run")
    prices = online.curve(tmp_path / "run", "kl_coefficient")
    assert prices[4] == pytest.approx(0.8 * prices[0]), "no distance yet: a fifth less"
