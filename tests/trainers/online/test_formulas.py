"""PPO and GRPO in their second iteration and their second pass over it, where nothing is 0 or 1 any more, beside the
papers' formulas over transformers' own models: loops over tokens, and none of the functions that training uses.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.by_hand import ByHand, Written, log_probs_of, plain_policy, values_of, written
from tests.trainers.online.online_world import COMMON, LORA, OnlineWorld

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

LOW, HIGH = 0.1, 0.3
TWO_PASSES = COMMON | {"passes": 2, "clipLow": LOW, "clipHigh": HIGH}
FAST = {"training.learningRate": 0.003, "training.schedule": "constant", "training.warmupFraction": 0.0}
LAST = 3
"""Step 2 writes the rollouts of the second iteration, and the next one learns from them again."""


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("formulas"))


def assert_gradients(engine: Any, wanted: dict[str, Tensor]) -> None:
    found = {name: one.grad for name, one in engine.module.named_parameters() if one.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-3)


def white(rows: list[list[float]]) -> list[list[float]]:
    every = [value for row in rows for value in row]
    mean, deviation = statistics.fmean(every), math.sqrt(statistics.variance(every) + 1e-8)
    return [[(value - mean) / deviation for value in row] for row in rows]


def test_ppo_has_gradient_and_figures_of_the_formulas_in_its_second_iteration(
    online: OnlineWorld, tmp_path: Path
) -> None:
    price, gamma, lam, dual, near, weight, most = 0.5, 0.98, 0.9, 1.4, 0.05, 0.3, 0.08
    settings = TWO_PASSES | {
        "kl": {"coefficient": price},
        "gamma": gamma,
        "gaeLambda": lam,
        "dualClip": dual,
        "rewardClip": most,
        "critic": {"clip": near, "coefficient": weight, "learningRate": 0.01},
    }
    plan = online.plan("ppo", {"method": {"ppo": settings}} | FAST, evaluated=False)
    with ByHand.of(plan, online, tmp_path) as run:
        run.step(0)
        run.step(1)
        then = run.weights()
        run.step(2)
        now = run.weights()
        batches, figures = run.backward(LAST)
    rollouts = written(batches)
    num_tokens = sum(len(one.answer) for one in rollouts)
    assert batches.divisor == num_tokens

    reference, writer, policy = (plain_policy(online.world.model, weights) for weights in (None, then, now))
    critics, heads = [], []
    for weights in (then, now):
        critics.append(plain_policy(online.world.model).model)
        for name, parameter in critics[-1].named_parameters():
            parameter.data.copy_(weights[f"critic.{name}"])
        heads.append(weights["value_head.weight"].clone().requires_grad_())
    old, old_values, advantages, returns = [], [], [], []
    decided: dict[str, int] = defaultdict(int)
    for one in rollouts:
        with torch.no_grad():
            said, said_before = log_probs_of(writer, one).tolist(), log_probs_of(reference, one).tolist()
            values = values_of(critics[0], heads[0], one).tolist()
        reward = min(max(run.reward(one), -most), most)
        decided["rewardClip"] += reward == most
        rewards = [-price * (a - b) for a, b in zip(said, said_before, strict=True)]
        rewards[-1] += reward
        carried = 0.0
        gains: list[float] = []
        for place in reversed(range(len(values))):
            after = values[place + 1] if place + 1 < len(values) else 0.0
            carried = rewards[place] + gamma * after - values[place] + gamma * lam * carried
            gains.insert(0, carried)
        old.append(said)
        old_values.append(values)
        advantages.append(gains)
        returns.append([gain + value for gain, value in zip(gains, values, strict=True)])
    advantages = white(advantages)

    of_policy, of_critic, far = torch.zeros(()), torch.zeros(()), 0.0
    for place, one in enumerate(rollouts):
        assert one.advantages == pytest.approx(advantages[place], abs=2e-4)
        new, new_values = log_probs_of(policy, one), values_of(critics[1], heads[1], one)
        for token in range(len(one.answer)):
            gain, ratio = advantages[place][token], (new[token] - old[place][token]).exp()
            apart = float(new[token].detach()) - old[place][token]
            far += math.exp(apart) - 1 - apart
            kept = torch.clamp(ratio, 1 - LOW, 1 + HIGH)
            gained = torch.minimum(ratio * gain, kept * gain)
            decided["clipLow"] += bool(ratio < 1 - LOW and gain < 0)
            decided["clipHigh"] += bool(ratio > 1 + HIGH and gain > 0)
            if gain < 0 and float(gained.detach()) < dual * gain:
                decided["dualClip"] += 1
                gained = torch.tensor(dual * gain)
            of_policy = of_policy - gained
            value, before, wanted = new_values[token], old_values[place][token], returns[place][token]
            free = (value - wanted) ** 2
            bounded = (torch.clamp(value, before - near, before + near) - wanted) ** 2
            decided["critic.clip"] += bool(bounded > free)
            of_critic = of_critic + torch.maximum(free, bounded) / 2
    assert {name for name, count in decided.items() if count} == {
        *("rewardClip", "clipLow", "clipHigh", "dualClip", "critic.clip")
    }, f"every bound must have something to decide: {dict(decided)}"
    ((of_policy + weight * of_critic) / num_tokens).backward()  # type: ignore[no-untyped-call]
    wanted_gradients = dict(policy.named_parameters()) | {
        f"critic.{name}": parameter for name, parameter in critics[1].named_parameters()
    }
    wanted_gradients["value_head.weight"] = heads[1]
    assert_gradients(run.engine, {name: parameter.grad for name, parameter in wanted_gradients.items()})
    cut = decided["clipLow"] + decided["clipHigh"] + decided["dualClip"]
    assert figures["clip_fraction"] == pytest.approx(cut / num_tokens)
    assert figures["approx_kl"] == pytest.approx(far / num_tokens, abs=1e-4)
    assert figures["policy_loss"] == pytest.approx(float(of_policy.detach()) / num_tokens, abs=1e-4)
    assert figures["value_loss"] == pytest.approx(float(of_critic.detach()) / num_tokens, rel=1e-3)
    assert figures["kl"] == pytest.approx(distance(writer, reference, rollouts), rel=1e-3)
    assert figures["entropy"] == pytest.approx(entropy(policy, rollouts), rel=1e-3)


def distance(policy: Any, reference: Any, rollouts: list[Written]) -> float:
    """Mean over tokens of log p - log p_reference."""
    with torch.no_grad():
        gaps = [log_probs_of(policy, one) - log_probs_of(reference, one) for one in rollouts]
    return float(torch.cat(gaps).mean())


def entropy(policy: Any, rollouts: list[Written]) -> float:
    found = []
    for one in rollouts:
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([one.prompt + one.answer])).logits[0, len(one.prompt) - 1 : -1]
        found.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("baseline", ["grpo", "dr_grpo", "rloo"])
def test_grpo_has_gradient_and_figures_of_the_formulas_in_its_second_iteration(
    baseline: str, online: OnlineWorld, tmp_path: Path
) -> None:
    price, buffer, longest = 0.3, 20, 32  # long enough for some to end by themselves
    settings = TWO_PASSES | {
        "sampling": {"maxNewTokens": longest},
        "groupSize": 4,
        "baseline": baseline,
        "klCoefficient": price,
        "overlongBuffer": buffer,
    }
    plan = online.plan("grpo", {"method": {"grpo": settings}} | FAST, evaluated=False)
    with ByHand.of(plan, online, tmp_path) as run:
        run.step(0)
        run.step(1)
        then = run.weights()
        run.step(2)
        now = run.weights()
        batches, figures = run.backward(LAST)
    rollouts = written(batches)
    num_tokens = sum(len(one.answer) for one in rollouts)

    groups: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for one in rollouts:
        groups[tuple(one.prompt)].append(score(run, one, longest, buffer))
    assert {len(group) for group in groups.values()} == {4}, "each prompt of these is another one"
    assert len({len(one.answer) for one in rollouts}) > 1, "answers of one length would all lose as much"
    reference, writer, policy = (plain_policy(online.world.model, weights) for weights in (None, then, now))
    loss, far, num_cut = torch.zeros(()), 0.0, 0
    for one in rollouts:
        gain = advantage(baseline, score(run, one, longest, buffer), groups[tuple(one.prompt)])
        assert one.advantages == pytest.approx([gain] * len(one.answer), abs=1e-4)
        with torch.no_grad():
            old, before = log_probs_of(writer, one), log_probs_of(reference, one)
        new = log_probs_of(policy, one)
        for token in range(len(one.answer)):
            ratio = (new[token] - old[token]).exp()
            kept = torch.clamp(ratio, 1 - LOW, 1 + HIGH)
            num_cut += bool(kept * gain < ratio * gain)
            back = before[token] - new[token]
            k3 = back.exp() - 1 - back
            far += float(k3.detach())
            loss = loss - torch.minimum(ratio * gain, kept * gain) + price * k3
    assert num_cut
    (loss / num_tokens).backward()  # type: ignore[no-untyped-call]
    assert_gradients(run.engine, {name: parameter.grad for name, parameter in policy.named_parameters()})
    assert figures["kl"] == pytest.approx(far / num_tokens, rel=1e-3)
    assert figures["clip_fraction"] == pytest.approx(num_cut / num_tokens)


def score(run: ByHand, one: Written, longest: int, buffer: int) -> float:
    """The reward, less up to 1 over the last tokens that an answer may have."""
    return run.reward(one) - max(len(one.answer) - (longest - buffer), 0) / buffer


def advantage(baseline: str, reward: float, group: list[float]) -> float:
    if baseline == "rloo":
        return reward - (sum(group) - reward) / (len(group) - 1)
    gain = reward - statistics.fmean(group)
    return gain / (statistics.stdev(group) + 1e-4) if baseline == "grpo" else gain


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_activations_that_are_computed_anew_are_those_of_whoever_computed_them_first(
    tuning: dict[str, Any], online: OnlineWorld, tmp_path: Path
) -> None:
    """With LoRA policy and critic are adapters of one base, and the backward pass comes when neither is in use."""
    found: list[dict[str, Tensor]] = []
    for anew in (False, True):
        changes = {"method": {"ppo": TWO_PASSES}, "training.activationCheckpointing": anew} | FAST | tuning
        with ByHand.of(online.plan("ppo", changes, evaluated=False), online, tmp_path / str(anew)) as run:
            run.step(0)
            run.backward(1)
            found.append({name: one.grad for name, one in run.engine.module.named_parameters() if one.grad is not None})
    wanted, again = found
    assert wanted.keys() == again.keys()
    assert any("critic" in name and gradient.any() for name, gradient in wanted.items())
    for name, gradient in wanted.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_the_critic_has_a_learning_rate_of_its_own(tuning: dict[str, Any], online: OnlineWorld, tmp_path: Path) -> None:
    """AdamW's first step changes a weight by the rate itself, however large its gradient is."""
    settings = TWO_PASSES | {"critic": {"learningRate": 0.02}}
    changes = {"method": {"ppo": settings}, "training.optimizer": {"weightDecay": 0.0}} | FAST | tuning
    with ByHand.of(online.plan("ppo", changes, evaluated=False), online, tmp_path) as run:
        before = run.weights()
        run.step(0)
        moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in run.weights().items()}
    of_policy = {name: by for name, by in moved.items() if by and "critic" not in name and "value" not in name}
    assert moved["value_head.weight"] == pytest.approx(0.02, rel=0.01)
    assert max(of_policy.values()) == pytest.approx(0.003, rel=0.01)


def test_prompts_that_teach_nothing_are_learned_from_only_for_want_of_others(
    online: OnlineWorld, tmp_path: Path
) -> None:
    """The policy stays as it is, so that prompts can be answered twice: one after the other, and by who chooses."""
    letter = {"function": {"call": "tests.trainers.online.scores:many_letters", "settings": {"letter": "j"}}}
    settings = COMMON | {"groupSize": 4, "rewards": [letter]}
    still = {"training.learningRate": 1e-12}
    plan = online.plan("grpo", {"method": {"grpo": settings}} | still, evaluated=False)
    with ByHand.of(plan, online, tmp_path / "all") as run:
        rounds = [groups_of(written(run.step(number))) for number in range(3)]

        def teaches(group: frozenset[Any]) -> bool:
            texts = [run.text(list(answer)) for _, answer, _ in group]
            return len({text.count("j") / max(len(text), 1) for text in texts}) > 1

        good, others, num_asked = [], [], 0
        for groups in rounds:
            num_asked += len(groups)
            good += [group for group in groups if teaches(group)]
            others += [group for group in groups if not teaches(group)]
            if len(good) >= len(groups):
                break
        wanted = [*good, *others][: len(rounds[0])]
        assert good
        assert others
        assert num_asked > len(rounds[0])
    plan = online.plan("grpo", {"method": {"grpo": settings | {"dynamicSampling": 2}}} | still, evaluated=False)
    with ByHand.of(plan, online, tmp_path / "chosen") as run:
        batches, figures = run.backward(0)
    assert figures["prompts_asked"] == num_asked
    assert sorted(map(sorted, groups_of(written(batches)))) == sorted(map(sorted, wanted))


def groups_of(rollouts: list[Written]) -> list[frozenset[Any]]:
    """(prompt, answer, which of several like it) of each, by prompt."""
    found: dict[tuple[int, ...], set[Any]] = defaultdict(set)
    for one in rollouts:
        prompt, answer = tuple(one.prompt), tuple(one.answer)
        alike = sum((prompt, answer, number) in found[prompt] for number in range(len(rollouts)))
        found[prompt].add((prompt, answer, alike))
    return [frozenset(group) for group in found.values()]
