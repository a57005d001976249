"""Largest difference from TRL's PPOTrainer of all that PPO computes, on its own rollouts in float64.

    python -m tests.bench.bench_ppo_parity [--draws 3]

TRL 1.12, the last that has PPO, trains a small policy and critic for two iterations of three passes; our method is then
asked what TRL's own had been asked: rewards of tokens, whitening, advantages, returns, the losses of policy and critic,
and the gradients of their sum. TRL puts a score one token behind the end of an answer; here it is on the last one, so
that "paid" of TRL's is the mask for what has to do with rewards.
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

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Identity

from finetune_trainers.online.method import Judged
from finetune_trainers.online.ppo import Ppo
from finetune_trainers.rl.kl import kl_estimate
from finetune_trainers.rl.rewards import token_rewards
from finetune_trainers.rl.statistics import whiten
from tests.bench.common import timed_process, write_results
from tests.bench.online_losses import ToldModels, experience, ppo, rollouts

GOAL = 1e-5
TRL = "1.12.0"
HERE = Path(__file__).parent
KL, GAMMA, LAMBDA, CLIP, VALUE_CLIP, VALUE_COEFFICIENT = 0.05, 0.97, 0.9, 0.2, 0.2, 0.1
Tensors = dict[str, Tensor]


def method(models: ToldModels) -> Ppo:
    """With TRL's settings; whitening is left to `whiten` itself, since TRL's mask for it is another one."""
    return ppo(
        models,
        kl={"coefficient": KL},
        gamma=GAMMA,
        gaeLambda=LAMBDA,
        clipLow=CLIP,
        clipHigh=CLIP,
        critic={"clip": VALUE_CLIP, "coefficient": VALUE_COEFFICIENT},
        whitenAdvantages=False,
    )


def of_rollouts(given: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, ours, TRL's) of an iteration."""
    paid = given["paid"]
    kl = kl_estimate(given["log_probs"], given["ref_log_probs"], "k1")
    yield "kl", kl, given["kl"]
    yield "token rewards", token_rewards(given["scores"], paid, kl, KL), given["rewards"]
    known = zip(*(given[name] for name in ("log_probs", "ref_log_probs", "values")), paid, strict=True)
    judged = [Judged(*(value[held] for value in values)) for *values, held in known]
    said, _ = method(ToldModels())._weigh(rollouts(given["scores"], paid.sum(1)), judged)
    yield "advantages", torch.cat([one.advantages for one in said]), given["advantages"][paid]
    yield "returns", torch.cat([one.returns for one in said if one.returns is not None]), given["returns"][paid]
    yield "whitened advantages", whiten(given["advantages"], given["ended"]), given["whitened"]


def of_step(given: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, ours, TRL's) of a micro-batch of an optimizer step."""
    log_probs, values = given["log_probs"].requires_grad_(), given["values"].requires_grad_()
    ended, paid = given["ended"], given["paid"]
    learner = method(ToldModels(log_probs[ended], values[paid]))
    batch = experience(
        old_log_probs=given["old"][ended],
        advantages=given["advantages"][ended],
        old_values=given["old_values"][paid],
        returns=given["returns"][paid],
    )
    of_policy, of_critic = learner.losses(Identity(), batch)
    policy, critic = of_policy.total / ended.sum(), of_critic.total / paid.sum()
    pulls = torch.autograd.grad(policy + critic, [log_probs, values])
    yield "policy loss", policy, given["policy_loss"]
    yield "value loss", critic / VALUE_COEFFICIENT, given["value_loss"]
    yield "gradient of log-probs", pulls[0], given["grad_log_probs"]
    yield "gradient of values", pulls[1], given["grad_values"]


def theirs(draws: int, folder: Path) -> Tensors:
    """What TRL finds, by "draw/..."."""
    interpreter = subprocess.run([HERE / "trl_env.sh", TRL], check=True, capture_output=True, text=True).stdout.strip()
    settings, found = folder / "settings.json", folder / "found.safetensors"
    settings.write_text(json.dumps({"draws": draws, "kl": KL}))
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
        compared = of_step(given) if "/" in group else of_rollouts(given)
        for what, mine, other in compared:
            difference = float((mine.detach() - other).abs().max())
            # A comparison with NaN is false, so that NaN would pass for agreement.
            worst[what] = max(worst.get(what, 0.0), difference if math.isfinite(difference) else math.inf)
            seen[what] = max(seen.get(what, 0.0), float(other.abs().max()))
    for what, value in worst.items():
        print(f"{what:<22} within {value:.1e}, of {seen[what]:.2g} at most")
    largest = max(worst.values())
    write_results("ppo_parity", {"goal": GOAL, "draws": draws, "largest_difference": worst, "largest_value": seen})
    print(f"largest difference in {draws} draws: {largest:.1e} (goal {GOAL:.0e})")
    return int(not largest <= GOAL)


if __name__ == "__main__":
    sys.exit(main())
