"""Reward models as rewards: the scores of training, whatever wrote the answers, and what is refused before workers
start."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune_api.plan import RunPlan
from finetune_api.spec import ModelReward, RewardSource
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.errors import UserError
from finetune_trainers.lean_peft import peft
from finetune_trainers.methods.reward import Calibration
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.rewards import Episode
from finetune_trainers.rewards import judge as judge_module
from finetune_trainers.rewards.building import build_rewards, check_rewards
from finetune_trainers.rewards.judge import Judge, load_judge
from tests.trainers.factories import tiny_model, write_rows
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import LORA, JudgedWorld

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

WAYS = ("chosen", "rejected")
FIELD = "spec.method.grpo.rewards[0].model"
STEPS = {"training.maxSteps": 12, "training.learningRate": 0.01}


class Trained:
    """A world in which a reward model was trained, and a policy's plan."""

    def __init__(self, folder: Path, tuning: dict[str, Any]) -> None:
        self.folder = folder
        self.judged = JudgedWorld.at(folder / "world")
        self.judged.train(self.judged.plan("reward", STEPS | tuning), folder / "run")
        self.artifact = folder / "run" / "artifact"
        write_rows(folder / "world" / "rows.jsonl", 8)
        self.plan = self.judged.world.plan()
        self.prepared: PreparedRun = self.judged.world.prepare(self.plan, folder / "policy")

    @property
    def source(self) -> str:
        return self.artifact.as_uri()

    def judge(self, plan: RunPlan | None = None, **fields: Any) -> Judge:
        reward = ModelReward(source=fields.pop("source", self.source), **fields)
        plan = plan or self.plan
        return load_judge(reward, FIELD, plan, self.prepared, SingleProcessContext(plan, self.folder / "policy"))

    def rows(self) -> list[dict[str, str]]:
        lines = (self.judged.world.folder / "eval-pairs.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def episodes(self, way: str) -> list[Episode]:
        return [Episode([{"role": "user", "content": row["prompt"]}], row[way]) for row in self.rows()]

    def figure(self, name: str) -> float:
        """What training said at its end."""
        return self.judged.curve(self.folder / "run", f"eval_rewards/{name}")[-1]


@pytest.fixture(scope="module", params=[{}, LORA], ids=["full", "lora"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), request.param)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("full"), {})


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_TOKENS_PER_PASS", {"cpu": 64})


def values(judge: Judge, episodes: list[Episode]) -> list[float]:
    scored = judge.score(episodes)
    assert scored.faults == {}
    return [value for value in scored.values if value is not None]


def plain_scores(trained: Trained, way: str) -> list[float]:
    """As transformers and PEFT give them, one text at a time."""
    tokenizer: Any = AutoTokenizer.from_pretrained(trained.artifact)
    kind: Any = AutoModelForSequenceClassification
    if (trained.artifact / "adapter_config.json").is_file():
        kind = peft.AutoPeftModelForSequenceClassification
    model = kind.from_pretrained(trained.artifact, num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id

    def score(row: dict[str, str]) -> float:
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[way]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        with torch.no_grad():
            logits: Tensor = model(**tokenizer(text, return_tensors="pt")).logits
        return logits.item()

    return [score(row) for row in trained.rows()]


def test_chosen_answers_score_above_rejected_ones_by_what_training_measured(trained: Trained) -> None:
    judge = trained.judge(calibrated=False)
    chosen, rejected = (values(judge, trained.episodes(way)) for way in WAYS)
    wins = sum(one > other for one, other in zip(chosen, rejected, strict=True)) / len(chosen)
    assert wins == pytest.approx(trained.figure("accuracies"))
    assert wins > 0.7
    assert sum(chosen) / len(chosen) == pytest.approx(trained.figure("chosen"), abs=1e-4)
    assert sum(rejected) / len(rejected) == pytest.approx(trained.figure("rejected"), abs=1e-4)


@pytest.mark.usefixtures("small_passes")
def test_scores_are_those_of_plain_transformers_in_the_order_of_the_answers(trained: Trained) -> None:
    judge = trained.judge(calibrated=False)
    for way in WAYS:
        assert values(judge, trained.episodes(way)) == pytest.approx(plain_scores(trained, way), abs=1e-4)


def test_a_calibrated_score_lies_around_zero_with_a_spread_of_one(trained: Trained) -> None:
    judge = trained.judge()
    found = torch.tensor([value for way in WAYS for value in values(judge, trained.episodes(way))])
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert found.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("score", [-3000.0, -1.0, 0.5, 3000.0])
def test_a_squashed_score_is_between_0_and_1(score: float) -> None:
    calibration = Calibration(mean=0.5, scale=2.0, squash=True, measured_on="eval")
    found = judge_module._calibrated(score, calibration)
    assert 0 <= found <= 1
    if abs(score) < 100:
        assert found == pytest.approx(1 / (1 + math.exp(-(score - 0.5) / 2)))


def test_a_policy_with_another_tokenizer_is_scored_by_text_and_that_is_said_once(
    full: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The judge's vocabulary is turned round, so the same ids mean other texts."""
    other = shutil.copytree(full.judged.world.model, tmp_path / "policy")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(content))
    plan = full.judged.world.plan({"model.source": other.as_uri()})
    prepared = full.judged.world.prepare(plan, tmp_path / "run")
    expected = values(full.judge(), full.episodes("chosen"))
    with caplog.at_level(logging.INFO):
        context = SingleProcessContext(plan, tmp_path / "run")
        judge = load_judge(ModelReward(source=full.source), FIELD, plan, prepared, context)
        found = values(judge, full.episodes("chosen"))
        judge.score(full.episodes("rejected"))
    assert found == expected
    said = [message for message in caplog.messages if "another tokenizer" in message]
    assert said == [f"{FIELD} has another tokenizer or template than the model: answers go to it as text"]


def test_nothing_is_said_of_the_same_tokenizer(full: Trained, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        full.judge()
    assert not any("another tokenizer" in message for message in caplog.messages)


def test_what_is_longer_than_the_positions_is_cut_at_its_end_and_that_is_said_once(
    full: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    judge = full.judge()
    positions = judge._max_positions
    assert positions is not None
    prompt = [{"role": "user", "content": "the cat"}]
    longer, longest = (Episode(prompt, "cat " * positions + "dog " * count) for count in (0, positions))
    with caplog.at_level(logging.WARNING):
        found = values(judge, [longer, longest, Episode(prompt, "cat")])
        judge.score([longest])
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] != pytest.approx(found[2], abs=1e-4)
    [said] = [message for message in caplog.messages if "positions" in message]
    assert said.startswith(f"2 of 3 answers are longer with their prompts than the reward model's {positions}")


def test_an_empty_answer_has_a_score(full: Trained) -> None:
    assert len(values(full.judge(), [Episode([{"role": "user", "content": "the cat"}], "")])) == 1


def test_a_score_that_is_not_finite_is_a_failure(full: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "scores", lambda *_: torch.tensor([float("nan")]))
    scored = full.judge().score(full.episodes("chosen")[:1])
    assert scored.values == [None]
    assert scored.faults == {0: "the reward model's score is nan"}


def test_a_template_that_refuses_a_prompt_is_a_failure_of_that_answer(full: Trained, tmp_path: Path) -> None:
    folder = shutil.copytree(full.artifact, tmp_path / "strict")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + (folder / "chat_template.jinja").read_text())
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "the cat"}]
    scored = full.judge(source=folder.as_uri()).score([Episode(system, "cat"), Episode(system[1:], "cat")])
    assert scored.values[0] is None
    assert scored.values[1] is not None
    assert "no system here" in scored.faults[0]


def test_a_reward_model_learns_nothing_and_keeps_the_plan_s_precision(full: Trained) -> None:
    plan = full.judged.world.plan({"training.precision": "bf16"})
    judge = full.judge(plan)
    parameters = list(judge._module.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in parameters)
    found = torch.tensor(values(judge, full.episodes("chosen")))
    assert torch.allclose(found, torch.tensor(values(full.judge(), full.episodes("chosen"))), atol=0.1)


@pytest.fixture
def zero3() -> Iterator[None]:
    """As it is on a worker whose policy DeepSpeed has split."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    yield
    assert is_deepspeed_zero3_enabled(), "the policy is still split"
    del config
    unset_hf_deepspeed_config()


@pytest.mark.usefixtures("zero3")
def test_beside_a_policy_that_is_split_a_reward_model_is_whole(full: Trained) -> None:
    judge = full.judge()
    assert not any(hasattr(parameter, "ds_id") for parameter in judge._module.parameters())
    assert len(values(judge, full.episodes("chosen"))) == len(full.rows())


def test_a_reward_model_is_one_reward_among_others(full: Trained) -> None:
    sources = [
        RewardSource.model_validate({"model": {"source": full.source}, "weight": 2.0}),
        RewardSource.model_validate({"metric": {"kind": "exact-match"}}),
    ]
    check_rewards(sources, "spec.method.sft.rewards")
    context = SingleProcessContext(full.plan, full.folder / "policy")
    rewards = build_rewards(sources, full.plan, full.prepared, context)
    episodes = [Episode(one.prompt, one.completion, {"answer": one.completion}) for one in full.episodes("chosen")]
    opinions = rewards.score(episodes)
    totals = rewards.totals(episodes, opinions)
    rewards.close()
    alone = values(full.judge(), full.episodes("chosen"))
    assert opinions == [{"model": value, "exact_match": 1.0} for value in alone]
    assert totals == pytest.approx([2 * value + 1 for value in alone])


def refused(source: str, **fields: Any) -> tuple[str | None, str]:
    """The one problem: its field below the reward model's, and what it says."""
    reward = RewardSource(model=ModelReward(source=source, **fields))
    with pytest.raises(UserError) as error:
        check_rewards([reward], "spec.method.grpo.rewards")
    [problem] = error.value.problems
    assert problem.path is not None
    return problem.path.removeprefix(f"{FIELD}."), problem.message


def test_a_model_that_only_writes_is_no_reward_model(full: Trained) -> None:
    field, message = refused(full.judged.world.model.as_uri())
    assert field == "source"
    assert message == (
        "is a model without a score head, which would make up its scores; name what method.reward trained, or a"
        " sequence classifier with one label"
    )


def test_an_adapter_that_only_writes_is_no_reward_model(full: Trained, tmp_path: Path) -> None:
    plan = full.judged.world.plan(LORA | {"training.maxSteps": 1})
    outcome = full.judged.world.train(plan, tmp_path / "run")
    assert outcome.failure is None
    assert "is an adapter without a score head" in refused((tmp_path / "run" / "artifact").as_uri())[1]


def test_a_classifier_with_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    assert "gives 3 scores for an answer, and a reward is one number" in refused(folder.as_uri())[1]


def test_an_adapter_whose_base_has_gone_says_where_it_was(tmp_path: Path) -> None:
    world = Trained(tmp_path, LORA | {"training.maxSteps": 1})
    world.judged.world.model.rename(tmp_path / "elsewhere")
    message = refused(world.source)[1]
    assert f"is an adapter of the model in {world.judged.world.model}, which is not there" in message


def test_a_calibration_that_is_asked_for_must_be_there(full: Trained, tmp_path: Path) -> None:
    folder = shutil.copytree(full.artifact, tmp_path / "bare")
    (folder / "calibration.json").unlink()
    field, message = refused(folder.as_uri(), calibrated=True)
    assert field == "calibrated"
    assert "has no calibration.json, which method.reward writes; leave calibrated out" in message
    raw = values(full.judge(calibrated=False), full.episodes("chosen"))
    assert values(full.judge(source=folder.as_uri()), full.episodes("chosen")) == raw


def test_a_calibration_that_cannot_be_read_is_refused(full: Trained, tmp_path: Path) -> None:
    folder = shutil.copytree(full.artifact, tmp_path / "broken")
    (folder / "calibration.json").write_text("{}")
    assert "set calibrated to false" in refused(folder.as_uri())[1]


def test_a_tokenizer_without_a_template_is_refused(full: Trained, tmp_path: Path) -> None:
    folder = shutil.copytree(full.artifact, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    assert "has a tokenizer without a chat template" in refused(folder.as_uri())[1]


@pytest.mark.parametrize("source", ["file:///nowhere/at/all", "job://reward"])
def test_a_reward_model_that_is_not_there_is_refused(source: str) -> None:
    assert refused(source)[0] == "source"


def test_a_bad_reward_model_ends_what_was_begun_before_it(full: Trained) -> None:
    sources = [
        RewardSource.model_validate({"function": {"call": "tests.trainers.rewards.sample_rewards:length"}}),
        RewardSource.model_validate({"model": {"source": "file:///nowhere"}}),
    ]
    with pytest.raises(UserError, match=r"rewards\[1\]\.model\.source"):
        build_rewards(sources, full.plan, full.prepared, SingleProcessContext(full.plan, full.folder / "policy"))
