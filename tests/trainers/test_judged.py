"""Learning from judged answers, end to end: rows, batches, steps, figures, artifact, and going on after a stop."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from finetune_api.progress import Artifact
from finetune_trainers.chat import answer
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.batches import all_sequences
from finetune_trainers.errors import UserError
from finetune_trainers.evaluation import evaluating
from finetune_trainers.lean_peft import peft
from finetune_trainers.methods.building import build_method, train_batches
from finetune_trainers.methods.log_probs import answers
from finetune_trainers.methods.pairs import Dpo
from finetune_trainers.methods.references import References
from finetune_trainers.ray_workers import RayWorkers
from finetune_trainers.worker import load
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import LORA, METHODS, JudgedWorld, zero
from tests.trainers.parity_group import train_all

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

ROOT = Path(__file__).parents[2]
STEPS = {"training.maxSteps": 8, "training.learningRate": 0.003}


ONE_BY_ONE = {"training.microBatchSize": 1}
ALL_AT_ONCE = {"training.microBatchSize": 8}


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


def log_prob(model: Any, ids: list[int], start: int) -> Tensor:
    """Sum over the tokens from `start`, one document in one plain forward pass."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :, 0].sum()  # type: ignore[no-any-return]


def test_the_first_dpo_step_is_that_of_plain_transformers(judged: JudgedWorld, tmp_path: Path) -> None:
    """Prompt, answer and end of turn go through the chat template; one document at a time, no packing."""
    plan = judged.plan("dpo", {"training.maxSteps": 2, "training.maxGradNorm": 0}, evaluated=False)
    prepared = judged.world.prepare(plan, tmp_path / "run")
    judged.train(plan, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(judged.world.model)
    model = AutoModelForCausalLM.from_pretrained(judged.world.model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (judged.world.folder / "pairs.jsonl").read_text().splitlines()]
    found = train_batches(plan, prepared, SingleProcessContext(plan, tmp_path / "run"))
    [wanted] = [batch.slots for batch in found.step(0).micro_batches]
    losses = []
    for _, number in wanted:
        row = rows[number]
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt).input_ids)
        said = [log_prob(model, tokenizer(prompt + row[way] + "<|im_end|>").input_ids, start) for way in WAYS]
        reference = [value.detach() for value in said]
        losses.append(-F.logsigmoid(0.1 * ((said[0] - reference[0]) - (said[1] - reference[1]))))
    torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert judged.curve(tmp_path / "run", "grad_norm")[0] == pytest.approx(norm.item(), rel=1e-4)
    assert judged.curve(tmp_path / "run", "loss")[0] == pytest.approx(math.log(2), abs=1e-5)


def documents_of(rows: list[dict[str, Any]], number: int, tokenizer: Any) -> list[tuple[list[int], int]]:
    """(tokens, where the answer begins) of row `number`: its chosen and its rejected answer, or its own and the
    mismatched one. No two neighbours of these rows have one prompt."""
    row = rows[number]
    asked = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    other = rows[number - 1 if number else 1]
    said = [row[way] for way in WAYS] if "chosen" in row else [row["completion"], other["completion"]]
    start = len(tokenizer(prompt).input_ids)
    return [(tokenizer(prompt + text + "<|im_end|>").input_ids, start) for text in said]


def loss_by_hand(method: str, values: Tensor, references: Tensor, lengths: Tensor, good: Tensor) -> Tensor:
    """The mean over rows by the papers' formulas; `values`, `references` and `lengths` are of documents [rows, 2]."""
    one, other = (values - references).unbind(1)
    gap = 0.1 * (one - other)
    match method:
        case "reward":
            losses = -F.logsigmoid(values[:, 0] - values[:, 1])
        case "dpo":
            losses = -F.logsigmoid(gap)
        case "smoothed dpo":
            losses = -0.9 * F.logsigmoid(gap) - 0.1 * F.logsigmoid(-gap)
        case "hinge":
            losses = (1 - gap).clamp(min=0)
        case "ipo":
            losses = (one / lengths[:, 0] - other / lengths[:, 1] - 1 / (2 * 0.1)) ** 2
        case "kto":
            kl = other.detach().mean()
            assert kl > 0.5, "otherwise it would not matter"
            losses = torch.where(good, 1 - torch.sigmoid(0.1 * (one - kl)), 1.5 * (1 - torch.sigmoid(0.1 * (kl - one))))
        case _:
            chosen, rejected = (values / lengths).exp().unbind(1)
            odds = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
            losses = -chosen.log() - 0.1 * torch.log(torch.sigmoid(odds.log()))
    return losses.mean()


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_of_a_policy_that_has_moved_are_those_of_plain_transformers(
    method: str, judged: JudgedWorld, tmp_path: Path
) -> None:
    """One document at a time, no packing. The policy has moved to where all these answers are likelier: KTO's reference
    point is 0 before."""
    plan = judged.plan(method, {"training.microBatchSize": 2}, evaluated=False)
    prepared = judged.world.prepare(plan, tmp_path)
    context = SingleProcessContext(plan, tmp_path)
    tuned, engine = load(plan, prepared, context)
    learned = build_method(plan, prepared, engine.module, context)
    tokenizer = AutoTokenizer.from_pretrained(judged.world.model)
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    more = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id} if method == "reward" else {}
    plain = kind.from_pretrained(judged.world.model, dtype=torch.float32, **more).eval()
    plain.load_state_dict(tuned.model.state_dict())
    file = judged.world.folder / ("rated.jsonl" if method == "kto" else "pairs.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    numbers = [number for _, number in train_batches(plan, prepared, context).visited()[:8]]
    documents = [document for number in numbers for document in documents_of(rows, number, tokenizer)]

    def said() -> Tensor:
        """[rows, 2]: scores, or log-probabilities of answers."""
        if method == "reward":
            values = [plain(input_ids=torch.tensor([ids])).logits[0, 0] for ids, _ in documents]
        else:
            values = [log_prob(plain, ids, start) for ids, start in documents]
        return torch.stack(values).view(-1, 2)

    references = said()
    references.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    with torch.no_grad():
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter += 0.3 * parameter.grad / norm
            parameter.grad = None
    tuned.model.load_state_dict(plain.state_dict())

    lengths = torch.tensor([len(ids) - start for ids, start in documents]).view(-1, 2)
    good = torch.tensor([bool(rows[number].get("label")) for number in numbers])
    wanted = loss_by_hand(method, said(), references.detach(), lengths, good)
    wanted.backward()  # type: ignore[no-untyped-call]
    step = learned.step(0)
    assert step is not None
    assert step.divisor == len(numbers)
    total = torch.zeros(())
    for batch in step.micro_batches:
        loss = learned.loss(engine.module, batch).total / step.divisor
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    engine.close()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-4)
    expected = dict(plain.named_parameters())
    for name, parameter in tuned.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name)


WAYS = ("chosen", "rejected")
FIGURES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")


@pytest.mark.parametrize("method", METHODS)
def test_the_same_pairs_in_any_micro_batches_make_the_same_steps(
    method: str, judged: JudgedWorld, tmp_path: Path
) -> None:
    for name, size in {"one": ONE_BY_ONE, "all": ALL_AT_ONCE}.items():
        judged.train(judged.plan(method, STEPS | size), tmp_path / name)
    for figure in (*FIGURES, "eval_loss"):
        one, other = judged.curve(tmp_path / "one", figure), judged.curve(tmp_path / "all", figure)
        assert one == pytest.approx(other, abs=2e-4), figure


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("method", ["reward", "dpo", "kto"])
def test_every_zero_stage_makes_the_steps_of_the_torch_engine(
    method: str, stage: int, judged: JudgedWorld, tmp_path: Path
) -> None:
    judged.train(judged.plan(method, STEPS), tmp_path / "torch")
    judged.train(judged.plan(method, STEPS | zero(stage)), tmp_path / "zero")
    for figure in FIGURES:
        one, other = judged.curve(tmp_path / "zero", figure), judged.curve(tmp_path / "torch", figure)
        assert one == pytest.approx(other, abs=5e-4), figure


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_in_bf16_pairs_are_learned_too(
    stage: int | None, tuning: dict[str, Any], judged: JudgedWorld, tmp_path: Path
) -> None:
    """Reward models: their head is the one new part."""
    changes = STEPS | tuning | {"training.precision": "bf16"} | (zero(stage) if stage is not None else {})
    outcome = judged.train(judged.plan("reward", changes), tmp_path / "run")
    assert outcome.eval is not None
    assert outcome.eval.loss_before is not None
    assert outcome.eval.loss_after is not None
    assert outcome.eval.loss_after < outcome.eval.loss_before


OF_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo-zero0": ("dpo", zero(0)),
    "dpo-lora-zero2": ("dpo", {"tuning": {"lora": {"rank": 4, "targetModules": ["all-linear"]}}} | zero(2)),
    "dpo-zero3": ("dpo", zero(3)),
    "reward-zero2": ("reward", zero(2)),
    "reward-zero3": ("reward", zero(3)),
    "kto-zero3": ("kto", zero(3) | {"training.microBatchSize": 1}),
    "orpo-zero1": ("orpo", zero(1)),
}


@pytest.fixture(scope="module")
def two_workers(judged: JudgedWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs of two workers, each in a folder of its name; they share one Ray Train group."""
    workdir = tmp_path_factory.mktemp("two-workers")
    workers = {"cluster": {"workers": {"replicas": 2, "cpus": 1}}}
    plans = {name: judged.plan(method, STEPS | changes | workers) for name, (method, changes) in OF_TWO.items()}
    prepared = None
    for name, plan in plans.items():
        (workdir / name).mkdir()
        prepared = judged.world.prepare(plan, workdir / name)
    assert prepared is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        with RayWorkers(plans["dpo-zero3"], train_all) as ray:
            ray.run(prepared, workdir, lambda future: future.result())
    return workdir


@pytest.mark.ray
@pytest.mark.parametrize("name", OF_TWO)
def test_two_workers_make_the_steps_of_one(name: str, two_workers: Path, judged: JudgedWorld, tmp_path: Path) -> None:
    ended = [json.loads(path.read_text()) for path in (two_workers / name).glob("ended-*.json")]
    assert [one["failure"] for one in ended] == [None, None]
    method, changes = OF_TWO[name]
    alone = {key: value for key, value in changes.items() if key == "tuning"}
    judged.train(judged.plan(method, STEPS | alone), tmp_path / "run")
    for figure in (*FIGURES, "eval_loss", "eval_rewards/margins"):
        two, one = judged.curve(two_workers / name, figure), judged.curve(tmp_path / "run", figure)
        assert two == pytest.approx(one, abs=5e-4), figure
    found, wanted = judged.artifact(two_workers / name), judged.artifact(tmp_path / "run")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[tensor], wanted[tensor], atol=2e-3) for tensor in wanted)


RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo, lora with dropout": ("dpo", LORA),
    "dpo, all parameters": ("dpo", {}),
    "dpo, zero 2, lora with dropout": ("dpo", LORA | zero(2)),
    "reward, lora with dropout": ("reward", LORA),
    "reward, all parameters": ("reward", {}),
    "reward, zero 3": ("reward", zero(3)),
    "kto, lora with dropout": ("kto", LORA),
    "orpo, lora with dropout": ("orpo", LORA),
}


@pytest.mark.parametrize("way", RESUMED)
def test_ten_and_ten_steps_are_twenty_to_the_bit(way: str, judged: JudgedWorld, tmp_path: Path) -> None:
    from finetune_trainers.checkpoint.listing import listed
    from finetune_trainers.checkpoint.storage.opening import open_storage

    method, changes = RESUMED[way]
    steps = {"training.maxSteps": 20, "training.microBatchSize": 2, "checkpoint": {"everySteps": 10}}
    plan = judged.plan(method, steps | changes)
    assert plan.checkpoint is not None
    uri = f"file://{tmp_path}/checkpoints"
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"uri": uri})})
    judged.train(plan, tmp_path / "whole")
    storage = open_storage(uri)
    for checkpoint, listing in listed(storage).items():
        if checkpoint.step == 20:
            storage.delete(list(listing.sizes))
    judged.train(plan, tmp_path / "rest")
    losses = judged.curve(tmp_path / "rest", "loss")
    assert losses == judged.curve(tmp_path / "whole", "loss")[10:]
    one, other = judged.artifact(tmp_path / "rest"), judged.artifact(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_reference_is_the_model_without_its_adapters(judged: JudgedWorld, tmp_path: Path) -> None:
    plan = judged.plan("dpo", STEPS | LORA)
    prepared = judged.world.prepare(plan, tmp_path)
    context = SingleProcessContext(plan, tmp_path)
    tuned, engine = load(plan, prepared, context)
    method = build_method(plan, prepared, engine.module, context)
    assert isinstance(method, Dpo)
    for name, parameter in tuned.model.named_parameters():
        if name in tuned.trainable:
            parameter.data.add_(0.1)
    [batch] = method.step(0).micro_batches
    assert batch.references is not None
    peft_model: Any = tuned.model
    with evaluating(engine.module), torch.no_grad():
        moved = answers(engine.module, batch).log_probs
        with peft_model.disable_adapter():
            base = answers(engine.module, batch).log_probs
    engine.close()
    assert torch.allclose(base, batch.references.flatten(), atol=1e-4)
    assert not torch.allclose(moved, base, atol=1e-2)


def test_a_later_attempt_finds_the_references_and_a_damaged_file_is_made_again(
    judged: JudgedWorld, tmp_path: Path
) -> None:
    plan = judged.plan("dpo", {"training.seed": 99})
    prepared = judged.world.prepare(plan, tmp_path)
    context = SingleProcessContext(plan, tmp_path)
    _, engine = load(plan, prepared, context)
    sources = prepared.data.train

    def table(module: Any) -> Tensor:
        [found] = References.of(sources, all_sequences(sources), module, prepared.model, plan, context)._tables
        return found

    first = table(engine.module)
    for parameter in engine.module.parameters():
        parameter.data.mul_(2)
    assert torch.equal(table(engine.module), first)
    [file] = Path(sources[0].folder).glob("reference-*.npy")
    np.save(file, np.zeros_like(first.numpy()))
    again = table(engine.module)
    engine.close()
    assert not torch.equal(again, first)
    assert again.abs().sum() > 0


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_is_asked_about_what_the_steps_come_by_and_later_about_what_is_missing(
    method: str, judged: JudgedWorld, tmp_path: Path
) -> None:
    """Three steps of eight are less than the forty rows, and six are all of them and eight once more."""
    known, tables = list[Tensor](), list[Tensor]()
    for num_steps in (3, 6):
        plan = judged.plan(method, {"training.seed": 98, "training.maxSteps": num_steps})
        (tmp_path / str(num_steps)).mkdir()
        prepared = judged.world.prepare(plan, tmp_path / str(num_steps))
        context = SingleProcessContext(plan, tmp_path)
        _, engine = load(plan, prepared, context)
        if known:  # what is known is not asked again
            for parameter in engine.module.parameters():
                parameter.data.mul_(2)
        learned = build_method(plan, prepared, engine.module, context)
        for step in range(num_steps):
            batches = learned.step(step)
            assert batches is not None
            for batch in batches.micro_batches:
                assert batch.references is not None
                assert batch.references.isfinite().all()
        engine.close()
        [file] = Path(prepared.data.train[0].folder).glob("reference-*.npy")
        tables.append(torch.from_numpy(np.load(file)))
        known.append(tables[-1].isfinite().all(1))
    assert [one.sum().item() for one in known] == [24, 40]
    assert torch.equal(tables[0][known[0]], tables[1][known[0]])


def stored_scores(model: Any, folder: Path, texts: list[str]) -> Tensor:
    """As a user would ask: plain transformers, padded, in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**inputs).logits[:, 0].float()  # type: ignore[no-any-return]


def texts_of(judged: JudgedWorld, way: str) -> list[str]:
    rows = [json.loads(line) for line in (judged.world.folder / "eval-pairs.jsonl").read_text().splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(judged.world.model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        + f"{row[way]}<|im_end|>"
        for row in rows
    ]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_a_reward_model_reloads_in_plain_transformers_with_the_same_scores(
    tuning: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    judged = JudgedWorld.at(tmp_path / "world", tied)
    judged.train(judged.plan("reward", STEPS | tuning), tmp_path / "run")
    folder = tmp_path / "run" / "artifact"
    if tuning:
        model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    else:
        model, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
    chosen, rejected = (stored_scores(model, folder, texts_of(judged, way)) for way in WAYS)
    figures = {
        name: judged.curve(tmp_path / "run", f"eval_rewards/{name}")[-1] for name in ("chosen", "rejected", "std")
    }
    assert chosen.mean().item() == pytest.approx(figures["chosen"], abs=1e-4)
    assert rejected.mean().item() == pytest.approx(figures["rejected"], abs=1e-4)
    calibration = json.loads((folder / "calibration.json").read_text())
    everything = torch.cat([chosen, rejected])
    assert calibration["mean"] == pytest.approx(everything.mean().item(), abs=1e-4)
    assert calibration["scale"] == pytest.approx(everything.std(correction=0).item(), abs=1e-4)
    assert (calibration["measuredOn"], calibration["squash"]) == ("eval", False)


def test_without_evaluation_data_scores_are_calibrated_on_what_was_trained_on(
    judged: JudgedWorld, tmp_path: Path
) -> None:
    squashed = {"method.reward.squash": True}
    judged.train(judged.plan("reward", {"training.maxSteps": 2} | squashed, evaluated=False), tmp_path / "run")
    calibration = json.loads((tmp_path / "run" / "artifact" / "calibration.json").read_text())
    assert (calibration["measuredOn"], calibration["squash"]) == ("train", True)
    assert calibration["scale"] > 0


def test_a_margin_asks_for_more_distance(judged: JudgedWorld, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (judged.world.folder / "pairs.jsonl").read_text().splitlines()]
    file = tmp_path / "margins.jsonl"
    file.write_text("".join(json.dumps(row | {"margin": 2.0}) + "\n" for row in rows))
    there = {"data.train": [{"source": f"file://{file}"}]}
    losses = []
    for name, changes in {"plain": {}, "margins": there}.items():
        judged.train(judged.plan("reward", {"training.maxSteps": 1} | changes, evaluated=False), tmp_path / name)
        losses += judged.curve(tmp_path / name, "loss")
    assert losses[1] > losses[0] + 1


def test_centring_pulls_scores_to_zero(judged: JudgedWorld, tmp_path: Path) -> None:
    spread = []
    for name, weight in {"plain": 0.0, "centred": 1.0}.items():
        changes = {"training.maxSteps": 20, "training.learningRate": 0.003, "method.reward.centerCoefficient": weight}
        judged.train(judged.plan("reward", changes), tmp_path / name)
        chosen, rejected = (judged.curve(tmp_path / name, f"eval_rewards/{way}")[-1] for way in WAYS)
        spread.append(abs(chosen + rejected))
    assert spread[1] < spread[0]


def test_a_card_of_a_reward_model_shows_how_to_ask_it(judged: JudgedWorld, tmp_path: Path) -> None:
    outcome = judged.train(judged.plan("reward", {"training.maxSteps": 1}), tmp_path / "run")
    [artifact] = outcome.artifacts
    assert isinstance(artifact, Artifact)
    card = (tmp_path / "run" / "artifact" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "text-classification" in card
    assert "AutoModelForCausalLM" not in card
    with pytest.raises(UserError, match="is a reward model: it scores answers and writes none"):
        answer(tmp_path / "run" / "artifact", None, ["Hello"])
