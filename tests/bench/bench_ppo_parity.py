"""Largest difference from TRL's PPOTrainer of all that PPO computes, on its own rollouts in float64.

    python -m tests.bench.bench_ppo_parity [--draws 3]

TRL 1.12, the last that has PPO, trains a small policy and critic for two iterations of three passes; each formula of
`finetune_trainers.rl` is then asked what TRL's own had been asked. Rewards of tokens, whitening, advantages, returns,
the losses of policy and critic, and the gradients of their sum. TRL puts a score one token behind the end of an answer;
here it is on the last one, so that "paid" of TRL's is the mask for what has to do with rewards.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune_trainers.rl.advantages import gae
from finetune_trainers.rl.aggregation import aggregate, divisor
from finetune_trainers.rl.kl import kl_estimate
from finetune_trainers.rl.policy_losses import ppo_policy_loss
from finetune_trainers.rl.rewards import token_rewards
from finetune_trainers.rl.statistics import whiten
from finetune_trainers.rl.value_losses import value_loss
from tests.bench.common import timed_process, write_results

GOAL = 1e-5
TRL = "1.12.0"
HERE = Path(__file__).parent
KL, GAMMA, LAMBDA, CLIP, VALUE_CLIP, VALUE_COEFFICIENT = 0.05, 0.97, 0.9, 0.2, 0.2, 0.1
CASES: dict[str, dict[str, Any]] = {
    "k1": {"kl_estimator": "k1", "whiten_rewards": False},
    "k3": {"kl_estimator": "k3", "whiten_rewards": False},
    "k1, rewards whitened": {"kl_estimator": "k1", "whiten_rewards": True},
}
Tensors = dict[str, Tensor]


def of_rollouts(given: Tensors, case: dict[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, ours, TRL's) of an iteration."""
    paid, ended, estimator = given["paid"], given["ended"], case["kl_estimator"]
    kl = kl_estimate(given["log_probs"], given["ref_log_probs"], estimator)
    yield f"kl {estimator}", kl, given["kl"]
    rewards = token_rewards(given["scores"], paid, kl, KL)
    yield "token rewards", rewards, given["rewards"]
    if case["whiten_rewards"]:
        rewards = whiten(rewards, paid, shift_mean=False)
        yield "whitened rewards", rewards, given["whitened_rewards"]
    found = gae(rewards, given["values"], paid, gamma=GAMMA, lam=LAMBDA)
    yield "advantages", found.advantages, given["advantages"]
    yield "returns", found.returns, given["returns"]
    yield "whitened advantages", whiten(found.advantages, ended), given["whitened"]


def of_step(given: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, ours, TRL's) of a micro-batch of an optimizer step."""
    log_probs, values = given["log_probs"].requires_grad_(), given["values"].requires_grad_()
    ended, paid = given["ended"], given["paid"]
    policy = ppo_policy_loss(log_probs, given["old"], given["advantages"], ended, clip_low=CLIP, clip_high=CLIP)
    critic = value_loss(values, given["old_values"], given["returns"], paid, clip=VALUE_CLIP)
    losses = [
        aggregate(one, held, "token", divisor(held, "token")) for one, held in ((policy[0], ended), (critic[0], paid))
    ]
    pulls = torch.autograd.grad(losses[0] + VALUE_COEFFICIENT * losses[1], [log_probs, values])
    yield "policy loss", losses[0], given["policy_loss"]
    yield "value loss", losses[1], given["value_loss"]
    yield "value clip fraction", critic.clipfrac, given["value_clipfrac"]
    yield "gradient of log-probs", pulls[0], given["grad_log_probs"]
    yield "gradient of values", pulls[1], given["grad_values"]


def theirs(draws: int, folder: Path) -> Tensors:
    """What TRL finds, by "case/draw/..."."""
    interpreter = subprocess.run([HERE / "trl_env.sh", TRL], check=True, capture_output=True, text=True).stdout.strip()
    settings, found = folder / "settings.json", folder / "found.safetensors"
    settings.write_text(json.dumps({"draws": draws, "kl": KL, "cases": CASES}))
    command = [interpreter, str(HERE / "baselines" / "trl_ppo_numbers.py"), str(settings), str(found)]
    timed_process(command, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, folder / "process.log")
    return load_file(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    draws = parser.parse_args().draws
    with tempfile.TemporaryDirectory(prefix="bench-ppo-parity-") as name:
        peer = theirs(draws, Path(name))
    groups: dict[str, Tensors] = {}
    for name, tensor in peer.items():
        group, _, figure = name.rpartition("/")
        groups.setdefault(group, {})[figure] = tensor
    worst: dict[str, float] = {}
    seen: dict[str, float] = {}
    for group, given in groups.items():
        case, _draw, *step = group.split("/")
        compared = of_step(given) if step else of_rollouts(given, CASES[case])
        for what, mine, other in compared:
            difference = float((mine.detach() - other).abs().max())
            # A comparison with NaN is false, so that NaN would pass for agreement.
            worst[what] = max(worst.get(what, 0.0), difference if math.isfinite(difference) else math.inf)
            seen[what] = max(seen.get(what, 0.0), float(other.abs().max()))
    for what, value in worst.items():
        print(f"{what:<22} within {value:.1e}, of {seen[what]:.2g} at most")
    largest = max(worst.values())
    write_results("ppo_parity", {"goal": GOAL, "draws": draws, "largest_difference": worst, "largest_value": seen})
    print(f"largest difference in {draws} draws of {len(CASES)} ways: {largest:.1e} (goal {GOAL:.0e})")
    return int(not largest <= GOAL)


if __name__ == "__main__":
    sys.exit(main())
