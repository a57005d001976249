"""Distillation, end to end: teacher, batches, steps, figures, artifact, and going on after a stop."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.spec import Distill
from finetune_trainers.data.batches import eval_batches
from finetune_trainers.prepared import PreparedModel, PreparedRun
from finetune_trainers.ray_workers import RayWorkers
from finetune_trainers.teacher import load_teacher
from tests.trainers import reference, tiny
from tests.trainers.factories import tiny_model
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.parity_group import train_all
from tests.trainers.school import LORA, School, artifact, curve, zero

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

ROOT = Path(__file__).parents[2]
DIVERGENCES = ("forward-kl", "reverse-kl", "jsd")


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.at(tmp_path_factory.mktemp("school"))


PARITY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "forward": ({}, {}),
    "forward, lora, warm, with the data": (LORA, {"temperature": 2.0, "alpha": 0.3}),
    "reverse": ({}, {"divergence": "reverse-kl"}),
    "reverse, lora, cold": (LORA, {"divergence": "reverse-kl", "temperature": 0.7}),
    "jsd": ({}, {"divergence": "jsd"}),
    "jsd, lora, uneven, warm, with the data": (
        LORA,
        {"divergence": "jsd", "beta": 0.1, "temperature": 1.5, "alpha": 0.5},
    ),
    "jsd, one row each, all tokens": ({}, {"divergence": "jsd", "beta": 0.9, "packing": False, "lossOn": "all"}),
}


@pytest.mark.parametrize("way", PARITY)
def test_the_steps_are_those_of_plain_transformers(way: str, school: School, tmp_path: Path) -> None:
    changes, distill = PARITY[way]
    plan = school.plan(changes, evaluated=False, **distill)
    prepared = school.world.prepare(plan, tmp_path / "run")
    school.train(plan, tmp_path / "run")
    wanted = reference.train(plan, prepared)
    assert curve(tmp_path / "run", "loss") == pytest.approx([step["loss"] for step in wanted], abs=1e-5)
    assert curve(tmp_path / "run", "grad_norm") == pytest.approx([step["grad_norm"] for step in wanted], rel=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(divergence: str, school: School, tmp_path: Path) -> None:
    plan = school.plan({"training.maxSteps": 1}, taught_by=school.world.model, divergence=divergence, temperature=2.0)
    school.train(plan, tmp_path)
    assert curve(tmp_path, "loss") == pytest.approx([0], abs=1e-5)
    assert curve(tmp_path, "grad_norm") == pytest.approx([0], abs=1e-5)
    assert curve(tmp_path, "kl") == pytest.approx([0], abs=1e-5)
    assert curve(tmp_path, "eval_token_agreement")[0] == 1


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_comes_to_say_what_its_teacher_says(
    divergence: str, tuning: dict[str, Any], school: School, tmp_path: Path
) -> None:
    longer = {"training.maxSteps": 30, "training.learningRate": 0.02 if tuning else 0.005}
    outcome = school.train(school.plan(longer | tuning, divergence=divergence), tmp_path)
    kl, agreement = curve(tmp_path, "eval_kl"), curve(tmp_path, "eval_token_agreement")
    assert kl[-1] < (0.9 if tuning else 0.7) * kl[0]
    assert agreement[-1] >= agreement[0]
    assert tuning or agreement[-1] > agreement[0]
    assert outcome.eval is not None
    assert outcome.eval.loss_before is not None
    assert outcome.eval.loss_after is not None
    assert outcome.eval.loss_after < outcome.eval.loss_before


def test_the_evaluation_is_that_of_plain_transformers(school: School, tmp_path: Path) -> None:
    """Over every trained token of the evaluation data, each document in a forward pass of its own."""
    plan = school.plan({"training.maxSteps": 1}, divergence="reverse-kl", temperature=2.0, alpha=0.25)
    prepared = school.world.prepare(plan, tmp_path)
    school.train(plan, tmp_path)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (school.world.model, school.teacher))
    said, taught, wanted = [], [], []
    with torch.no_grad():
        for batch in eval_batches(prepared.data, 1, 1, 0):
            for input_ids, labels in reference.documents(batch):
                trained = labels[0] != -100
                said.append(student(input_ids).logits[0][trained])
                taught.append(teacher(input_ids).logits[0][trained])
                wanted.append(labels[0][trained])
    ours, theirs, labels = torch.cat(said), torch.cat(taught), torch.cat(wanted)
    distill = plan.method.distill
    assert distill is not None
    of_data = torch.nn.functional.cross_entropy(ours, labels)
    loss = 0.75 * 4 * reference.divergence(ours, theirs, distill).mean() + 0.25 * of_data
    kl = reference.divergence(ours, theirs, Distill(teacher=distill.teacher)).mean()
    found = {name: curve(tmp_path, f"eval_{name}")[0] for name in ("loss", "kl", "perplexity", "token_agreement")}
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["kl"] == pytest.approx(kl.item(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(of_data.item()), rel=1e-5)
    assert found["token_agreement"] == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).float().mean().item())
    assert curve(tmp_path, "eval_tokens") == [len(labels)] * 2


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_makes_the_steps_of_the_torch_engine(stage: int, school: School, tmp_path: Path) -> None:
    school.train(school.plan(), tmp_path / "torch")
    school.train(school.plan(zero(stage)), tmp_path / "zero")
    for figure in ("loss", "kl", "cross_entropy", "eval_kl"):
        one, other = curve(tmp_path / "zero", figure), curve(tmp_path / "torch", figure)
        assert one == pytest.approx(other, abs=5e-4), figure


@pytest.mark.parametrize("stage", [None, 3])
def test_in_bf16_there_is_something_to_learn_too(stage: int | None, school: School, tmp_path: Path) -> None:
    changes = {"training.precision": "bf16"} | (zero(stage) if stage is not None else {})
    school.train(school.plan(changes), tmp_path)
    kl = curve(tmp_path, "eval_kl")
    assert kl[-1] < kl[0]


OF_TWO: dict[str, dict[str, Any]] = {"lora-zero2": LORA | zero(2), "zero3": zero(3), "zero0": zero(0)}


@pytest.fixture(scope="module")
def two_workers(school: School, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs of two workers, each in a folder of its name; they share one Ray Train group."""
    workdir = tmp_path_factory.mktemp("two-workers")
    workers = {"cluster": {"workers": {"replicas": 2, "cpus": 1}}, "training.microBatchSize": 1}
    plans = {name: school.plan(changes | workers, alpha=0.2) for name, changes in OF_TWO.items()}
    prepared = None
    for name, plan in plans.items():
        (workdir / name).mkdir()
        prepared = school.world.prepare(plan, workdir / name)
    assert prepared is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
        with RayWorkers(plans["zero3"], train_all) as ray:
            ray.run(prepared, workdir, lambda future: future.result())
    return workdir


@pytest.mark.ray
@pytest.mark.parametrize("name", OF_TWO)
def test_two_workers_make_the_steps_of_one(name: str, two_workers: Path, school: School, tmp_path: Path) -> None:
    ended = [json.loads(path.read_text()) for path in (two_workers / name).glob("ended-*.json")]
    assert [one["failure"] for one in ended] == [None, None]
    alone = {key: value for key, value in OF_TWO[name].items() if key == "tuning"}
    school.train(school.plan(alone, alpha=0.2), tmp_path)
    for figure in ("loss", "grad_norm", "kl", "cross_entropy", "eval_loss", "eval_kl", "eval_token_agreement"):
        two, one = curve(two_workers / name, figure), curve(tmp_path, figure)
        assert two == pytest.approx(one, abs=5e-4), figure
    found, wanted = artifact(two_workers / name), artifact(tmp_path)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[tensor], wanted[tensor], atol=2e-3) for tensor in wanted)


DROPOUT: dict[str, Any] = {"tuning": {"lora": {"rank": 4, "dropout": 0.1, "targetModules": ["all-linear"]}}}


@pytest.mark.parametrize("changes", [{}, DROPOUT, zero(3)], ids=["full", "lora with dropout", "zero 3"])
def test_six_and_six_steps_are_twelve_to_the_bit(changes: dict[str, Any], school: School, tmp_path: Path) -> None:
    from finetune_trainers.checkpoint.listing import listed
    from finetune_trainers.checkpoint.storage.opening import open_storage

    steps = {"training.maxSteps": 12, "training.microBatchSize": 2, "checkpoint": {"everySteps": 6}}
    plan = school.plan(steps | changes, divergence="jsd", alpha=0.1)
    assert plan.checkpoint is not None
    uri = f"file://{tmp_path}/checkpoints"
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"uri": uri})})
    school.train(plan, tmp_path / "whole")
    storage = open_storage(uri)
    for checkpoint, listing in listed(storage).items():
        if checkpoint.step == 12:
            storage.delete(list(listing.sizes))
    school.train(plan, tmp_path / "rest")
    for figure in ("loss", "kl"):
        assert curve(tmp_path / "rest", figure) == curve(tmp_path / "whole", figure)[6:], figure
    one, other = artifact(tmp_path / "rest"), artifact(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_artifact_is_the_student_and_its_card_names_the_teacher(school: School, tmp_path: Path) -> None:
    school.train(school.plan({"training.maxSteps": 1}, alpha=0.5), tmp_path)
    student = AutoModelForCausalLM.from_pretrained(school.world.model)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "artifact").num_parameters() == student.num_parameters()
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert f"| distill.teacher | file://{school.teacher} |" in card
    assert "| distill.alpha | 0.5 |" in card
    assert "| sequence length | 64, packed |" in card


def test_the_rows_are_those_that_supervised_fine_tuning_has_prepared(school: School, tmp_path: Path) -> None:
    sft = school.world.prepare(school.world.plan({"method": {"sft": {"maxSeqLength": 64}}}), tmp_path / "sft")
    distilled = school.world.prepare(school.plan(evaluated=False), tmp_path / "distill")
    assert [one.folder for one in distilled.data.train] == [one.folder for one in sft.data.train]
    assert distilled.data.train[0].from_cache


def test_a_teacher_is_held_frozen_in_the_precision_of_the_training(school: School, tmp_path: Path) -> None:
    plan = school.plan({"training.precision": "bf16"})
    prepared = school.world.prepare(plan, tmp_path)
    assert prepared.teacher is not None
    teacher = load_teacher(prepared.teacher, plan, torch.device("cpu"))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


def padded(source: Path, folder: Path) -> Path:
    """The model with 64 more rows in its embeddings and its head than its tokenizer has tokens."""
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(model.config.vocab_size + 64, mean_resizing=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def test_a_padded_vocabulary_changes_nothing(school: School, tmp_path: Path) -> None:
    school.train(school.plan(), tmp_path / "same")
    school.train(school.plan(taught_by=padded(school.teacher, tmp_path / "padded")), tmp_path / "run")
    assert curve(tmp_path / "run", "loss") == curve(tmp_path / "same", "loss")


def test_a_teacher_with_other_tokens_is_refused_before_any_worker(school: School, tmp_path: Path) -> None:
    tiny.tiny_model(tmp_path / "stranger", vocab_size=320)
    failure = school.refusal(school.plan(taught_by=tmp_path / "stranger"), tmp_path / "run")
    [problem] = failure.problems
    assert problem.path == "spec.method.distill.teacher.source"
    assert problem.value == f"file://{tmp_path / 'stranger'}"
    assert f"has another tokenizer than the model (file://{school.world.model})" in problem.message
    assert (
        "the first is number 0, which is '<pad>' in the teacher's and '<|endoftext|>' in the model's" in problem.message
    )
    assert not (tmp_path / "run" / "prepared.json").exists()


def test_a_token_more_is_told_as_missing(school: School, tmp_path: Path) -> None:
    folder = padded(school.teacher, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    [problem] = school.refusal(school.plan(taught_by=folder), tmp_path / "run").problems
    assert "1 of" in problem.message
    assert "which is '<more>' in the teacher's and missing in the model's" in problem.message


def test_the_teachers_tokenizer_may_be_elsewhere(school: School, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(school.teacher).save_pretrained(folder)
    bare = school.plan(taught_by=folder)
    [problem] = school.refusal(bare, tmp_path / "run").problems
    assert problem.path == "spec.method.distill.teacher.source"
    assert "name another folder in spec.method.distill.teacher.tokenizer" in problem.message
    elsewhere = {"source": f"file://{folder}", "tokenizer": f"file://{school.teacher}"}
    prepared = school.world.prepare(school.plan(teacher=elsewhere), tmp_path / "run")
    assert prepared.teacher is not None
    assert prepared.teacher.tokenizer_folder == str(school.teacher)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda folder: None, "no such file or folder"),
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: tiny_model(folder).joinpath("model.safetensors").unlink(), "has no model.safetensors"),
    ],
    ids=["it is not there", "it is no model", "its weights are missing"],
)
def test_a_teacher_that_cannot_be_read_is_refused(made: Any, says: str, school: School, tmp_path: Path) -> None:
    made(tmp_path / "teacher")
    [problem] = school.refusal(school.plan(taught_by=tmp_path / "teacher"), tmp_path / "run").problems
    assert problem.path == "spec.method.distill.teacher.source"
    assert says in problem.message


def test_a_teacher_with_fewer_positions_than_a_sequence_has_tokens_is_refused(school: School, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    [problem] = school.refusal(school.plan(taught_by=folder), tmp_path / "run").problems
    assert problem.path == "spec.method.distill.maxSeqLength"
    assert "the teacher has 32 positions" in problem.message


def test_what_was_prepared_travels_with_its_teacher(school: School, tmp_path: Path) -> None:
    prepared = school.world.prepare(school.plan(), tmp_path)
    assert isinstance(prepared.teacher, PreparedModel)
    assert prepared.teacher.folder == str(school.teacher)
    assert PreparedRun.model_validate_json(prepared.model_dump_json()) == prepared
