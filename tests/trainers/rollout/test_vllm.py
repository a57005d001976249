"""Rollout by vLLM: it has the trainer's weights to the bit, and writes what the trainer would.

Each test runs against a stand-in by transformers, and in a lane of their own against vLLM itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune_trainers.lean_peft import peft
from finetune_trainers.online.critic import CRITIC_PARTS
from finetune_trainers.rollout import Request, Sampling
from finetune_trainers.rollout.vllm_engine import VllmEngine
from finetune_trainers.rollout.vllm_process import VARIABLE, vllm_command
from finetune_trainers.rollout.vllm_weights import policy_weights
from finetune_trainers.tuning import peft_warnings_off
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import LORA, METHODS, OnlineWorld
from tests.trainers.rollout.vllm_compared import differing_weights, log_probs_of_trainer
from tests.trainers.rollout.vllm_environments import real_python, stand_in_python
from tests.trainers.rollout.writers import PAD, PROMPTS, engine_for, policy, requests_for

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

END_IDS = [7, 8, 9]
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
TOLERANCE = 1e-3
"""Nats, of log-probabilities in fp32."""
BOTH = ["stand-in", pytest.param("vllm", marks=pytest.mark.vllm)]


def head_of_32(folder: Path, architecture: str = "Llama") -> nn.Module:
    """A policy that vLLM's attention knows, too: it has no smaller heads."""
    return policy(folder, architecture, hidden_size=128, intermediate_size=96)


def with_adapters(model: Any) -> nn.Module:
    """`model` with a policy's adapter that does something, and a critic's."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    with peft_warnings_off():
        tuned: Any = peft.get_peft_model(model, config)
        tuned.add_adapter("critic", config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return tuned  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=BOTH)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return real_python() if request.param == "vllm" else stand_in_python(tmp_path_factory.mktemp("environment"))


class Writer:
    """One vLLM, and the policies that it is given by turns: starting it takes longest."""

    def __init__(self, folder: Path, python: str) -> None:
        self.policies = {"full": head_of_32(folder), "lora": with_adapters(head_of_32(folder))}
        settings = {
            "model": str(folder),
            "dtype": "float32",
            "max_length": 64,
            "batch_size": 8,
            "kv_cache_bytes": 1 << 28,
            "trust_remote_code": False,
            "tensor_parallel_size": 1,
        }
        self.engine = VllmEngine(
            vllm_command(python),
            settings,
            self.policies["full"],
            END_IDS,
            [],
            torch.float32,
            CRITIC_PARTS,
            piece_bytes=100_000,
        )

    def follow(self, which: str) -> nn.Module:
        """`which` policy it is from now on."""
        self.engine._module = module = self.policies[which]
        self.engine.update_weights()
        return module


@pytest.fixture(scope="module")
def writer(python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writer]:
    writer = Writer(tmp_path_factory.mktemp("model"), python)
    yield writer
    writer.engine.close()


@pytest.mark.parametrize("which", ["full", "lora"])
def test_after_a_sync_every_weight_is_the_trainers_to_the_bit(which: str, writer: Writer) -> None:
    module = writer.follow(which)
    weights = {name: tensor.clone() for name, tensor in policy_weights(module, torch.float32, CRITIC_PARTS)}
    [found] = writer.engine.digests()
    assert not differing_weights(found, weights)
    assert sum(torch.Size(shape).numel() for _, shape, _ in found.values()) == sum(
        one.numel() for one in weights.values()
    )


def test_what_is_synced_is_the_model_with_its_adapters_merged(tmp_path: Path) -> None:
    module: Any = with_adapters(head_of_32(tmp_path))
    weights = {name: tensor.clone() for name, tensor in policy_weights(module, torch.float32, CRITIC_PARTS)}
    merged = dict(module.merge_and_unload().named_parameters())
    assert weights.keys() == merged.keys()
    assert not [name for name, tensor in weights.items() if not torch.equal(tensor, merged[name])]


@pytest.mark.parametrize("which", ["full", "lora"])
def test_the_likeliest_answer_is_that_of_the_trainer(which: str, writer: Writer) -> None:
    module = writer.follow(which)
    told: list[tuple[int, int]] = []
    answers = writer.engine.generate(requests_for(PROMPTS), GREEDY, lambda done, of: told.append((done, of)))
    wanted = engine_for(module, END_IDS).generate(requests_for(PROMPTS), GREEDY)
    assert len({one.ended for one in wanted}) == 2, "some end and some do not"
    for found, right in zip(answers, wanted, strict=True):
        assert (found.ids, found.ended) == (right.ids, right.ended)
        assert found.log_probs == pytest.approx(right.log_probs, abs=TOLERANCE)
    assert told[-1] == (len(PROMPTS), len(PROMPTS))


@pytest.mark.parametrize("sampling", [Sampling(24, 0.7), Sampling(24, 1.3, top_p=0.8, top_k=20)], ids=["all", "top"])
def test_probabilities_are_those_at_the_temperature_and_before_anything_is_left_out(
    sampling: Sampling, writer: Writer
) -> None:
    module = writer.follow("lora")
    answers = writer.engine.generate(requests_for(PROMPTS), sampling)
    gaps = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        said = log_probs_of_trainer(module, prompt, answer, sampling.temperature)
        gaps.append((said - torch.tensor(answer.log_probs)).abs())
        assert answer.ended == (answer.ids[-1] in END_IDS)
        assert not set(answer.ids[:-1]) & set(END_IDS)
    assert torch.cat(gaps).mean() < TOLERANCE


def test_an_answer_follows_from_its_seed_whatever_shares_the_batch(writer: Writer) -> None:
    writer.follow("full")
    sampling = Sampling(max_new_tokens=12)
    requests = requests_for(PROMPTS)
    answers = writer.engine.generate(requests, sampling)
    alone = [writer.engine.generate([request], sampling)[0] for request in requests[:3]]
    assert [one.ids for one in alone] == [one.ids for one in answers[:3]]
    others = writer.engine.generate([Request(one.prompt_ids, one.seed + 1000) for one in requests], sampling)
    assert [one.ids for one in others] != [one.ids for one in answers]


def test_asleep_and_awake_it_goes_on(writer: Writer) -> None:
    writer.engine.sleep()
    writer.engine.wake()
    writer.follow("full")
    assert writer.engine.generate(requests_for([[3, 4, PAD + 5]]), GREEDY)[0].ids


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("online"), hidden_size=128)


@pytest.mark.parametrize(("method", "tuning"), [("grpo", LORA), ("ppo", {})], ids=["grpo lora", "ppo full"])
def test_two_iterations_learn_from_rollouts_of_vllm(
    method: str,
    tuning: dict[str, Any],
    python: str,
    online: OnlineWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, python)
    settings = METHODS[method][method] | {"vllm": {"kvCacheGib": 1, "gapLimit": 1e-9}}
    plan = online.plan(
        method, {"method": {method: settings}, "training.maxSteps": 8 if method == "ppo" else 2} | tuning
    )
    online.train(plan, tmp_path / "run")
    gaps = online.curve(tmp_path / "run", "rollout_gap")
    assert len(set(gaps)) > 1
    assert all(0 < gap < TOLERANCE for gap in gaps)
    assert all(norm > 0 for norm in online.curve(tmp_path / "run", "grad_norm"))
    told = re.findall(
        r"differ by [^ ]+ nats per token, and gapLimit is 1e-09", (tmp_path / "run/progress.jsonl").read_text()
    )
    assert len(told) == 1, "said once"


def test_with_a_staleness_of_1_vllm_writes_by_the_weights_of_the_iteration_before(
    python: str, online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, python)
    rewards = {}
    for staleness, rate in ((1, 0.01), (0, 1e-12)):
        vllm = {"kvCacheGib": 1, "gapLimit": 100, "maxStaleness": staleness}
        method = {"grpo": METHODS["grpo"]["grpo"] | {"vllm": vllm}}
        changes = {"method": method, "training.maxSteps": 3, "training.learningRate": rate} | LORA
        online.train(online.plan("grpo", changes, evaluated=False), tmp_path / str(staleness))
        rewards[staleness] = online.curve(tmp_path / str(staleness), "reward")
    assert online.curve(tmp_path / "1", "staleness") == [0, 1, 1]
    assert rewards[1][:2] == rewards[0][:2], "two iterations are written before anything is learned"
    assert rewards[1][2] != rewards[0][2]
    gaps = online.curve(tmp_path / "1", "rollout_gap")
    assert gaps[0] < TOLERANCE < min(gaps[1:])
