"""Largest difference from TRL of losses and gradients, on the same tensors in float64.

    python -m tests.bench.bench_rl_parity [--draws 5]

Each case is a loss beside the trainer of TRL's that has it, over random tensors drawn anew for each draw: that of GRPO
and its relatives by the method itself, in micro-batches, the others put together from `finetune_trainers.rl` as their
methods do. For PPO, which this TRL no longer has, see bench_ppo_parity. `tests/trainers/rl` holds the same functions
against numbers worked by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_trainers.online.method import Judged
from finetune_trainers.rl.advantages import group_advantages, mask_of_lengths
from finetune_trainers.rl.distillation import divergence
from finetune_trainers.rl.logprobs import token_log_probs, token_stats
from finetune_trainers.rl.preference_losses import dpo_loss, kto_loss, orpo_loss, reward_loss
from finetune_trainers.rl.statistics import masked_sum
from tests.bench.common import timed_process, write_results
from tests.bench.online_losses import ToldModels, experience, grpo, ppo, rollouts

GOAL = 1e-5
HERE = Path(__file__).parent
PAIRS, LENGTH, WORDS = 6, 12, 50
Tensors = dict[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One loss: `kind` says which function here and in baselines/trl_losses.py, `learn` what gets a gradient."""

    name: str
    kind: str
    settings: dict[str, Any]
    learn: tuple[str, ...]


def cases() -> list[Case]:
    learn = ("log_probs",)
    clipped: dict[str, Any] = {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "beta": 0.04,
        "weighted": False,
        "max_length": 2 * LENGTH,
    }
    return [
        *(Case(f"log-probs-{heat}", "log_probs", {"temperature": heat}, ("logits",)) for heat in (1.0, 0.7)),
        Case("dpo-sigmoid", "dpo", {"trl": "sigmoid", "kind": "sigmoid", "beta": 0.1}, learn),
        Case("dpo-smoothed", "dpo", {"trl": "aot", "kind": "sigmoid", "beta": 0.1, "label_smoothing": 0.1}, learn),
        Case("dpo-hinge", "dpo", {"trl": "hinge", "kind": "hinge", "beta": 0.1}, learn),
        Case("dpo-ipo", "dpo", {"trl": "ipo", "kind": "ipo", "beta": 0.1}, learn),
        Case("kto", "kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.33}, learn),
        Case("orpo", "orpo", {"beta": 0.1}, ("logits",)),
        Case("reward", "reward", {"margin": False, "center_coefficient": None}, ("chosen", "rejected")),
        Case("reward-margin", "reward", {"margin": True, "center_coefficient": 0.01}, ("chosen", "rejected")),
        *(
            Case(
                f"advantages-{baseline}", "advantages", {"trl": peer, "baseline": baseline, "group_size": 4}, ("pull",)
            )
            for baseline, peer in {"grpo": "group", "dr_grpo": "none"}.items()
        ),
        Case("grpo", "grpo", clipped | {"trl": "grpo", "aggregation": "sequence"}, learn),
        Case("dr-grpo", "grpo", clipped | {"trl": "dr_grpo", "aggregation": "constant", "beta": 0.0}, learn),
        Case("dapo", "grpo", clipped | {"trl": "dapo", "aggregation": "token", "clip_high": 0.28}, learn),
        Case(
            "dual-clip", "grpo", clipped | {"trl": "dapo", "aggregation": "token", "beta": 0.0, "dual_clip": 1.5}, learn
        ),
        Case("dapo-weighted", "grpo", clipped | {"trl": "dapo", "aggregation": "token", "weighted": True}, learn),
        *(
            Case(f"{peer}-{beta}", "divergence", {"trl": peer, "beta": beta, "temperature": 1.5}, ("student",))
            for peer in ("gkd", "distillation")
            for beta in (0.0, 0.3, 0.5, 1.0)
        ),
    ]


def draw(case: Case, generator: torch.Generator) -> Tensors:
    """What a loss of this kind starts from: log-probabilities are negative, responses differ in length."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = 2 * PAIRS
    mask = mask_of_lengths(torch.randint(1, LENGTH + 1, (rows,), generator=generator), LENGTH)
    if case.kind in ("log_probs", "orpo"):
        tokens = torch.randint(WORDS, (rows, LENGTH), generator=generator)
        given = {"logits": 3 * normal(rows, LENGTH, WORDS), "tokens": tokens}
        return given | ({"mask": mask} if case.kind == "orpo" else {"pull": normal(rows, LENGTH)})
    if case.kind == "advantages":
        rewards = normal(rows)
        rewards[0] = math.nan  # of one answer nobody could say anything
        rewards[4:8] = rewards[4]  # and those of one prompt are alike
        return {"rewards": rewards, "pull": normal(rows)}
    if case.kind == "divergence":
        return {"student": 3 * normal(rows, WORDS), "teacher": 3 * normal(rows, WORDS)}
    if case.kind == "reward":
        return {"chosen": normal(PAIRS), "rejected": normal(PAIRS), "margin": normal(PAIRS).abs()}
    log_probs = -normal(rows, LENGTH).abs() * mask
    given = {"log_probs": log_probs, "mask": mask}
    if case.kind == "grpo":
        near = {name: (log_probs + 0.4 * normal(rows, LENGTH)) * mask for name in ("old", "ref")}
        return given | near | {"advantages": normal(rows), "weights": normal(rows, LENGTH).exp().clamp(max=2)}
    given["ref"] = log_probs.sum(1) + normal(rows)
    if case.kind == "kto":
        mismatched = -normal(rows).abs()
        given |= {"desirable": torch.arange(rows) % 3 > 0, "mismatched": mismatched}
        given["ref_mismatched"] = mismatched + normal(rows) - 0.5
    return given


def ours_log_probs(given: Tensors, settings: Settings) -> Tensors:
    tokens = given["tokens"]
    found = token_stats(1.0 * given["logits"].flatten(0, 1), tokens.flatten(), settings["temperature"])
    log_probs, entropy = (value.view(tokens.shape) for value in found)
    return {"loss": (log_probs * given["pull"]).sum(), "log_probs": log_probs, "entropy": entropy}


def ours_dpo(given: Tensors, settings: Settings) -> Tensors:
    log_probs, references = masked_sum(given["log_probs"], given["mask"], dim=1), given["ref"]
    if settings["kind"] == "ipo":
        lengths = given["mask"].sum(1)
        log_probs, references = log_probs / lengths, references / lengths
    found = dpo_loss(
        *log_probs.chunk(2),
        *references.chunk(2),
        beta=settings["beta"],
        kind=settings["kind"],
        label_smoothing=settings.get("label_smoothing", 0.0),
    )
    return {"loss": found.losses.mean()}


def ours_kto(given: Tensors, settings: Settings) -> Tensors:
    kl = (given["mismatched"] - given["ref_mismatched"]).mean().clamp(min=0)
    log_probs = masked_sum(given["log_probs"], given["mask"], dim=1)
    return {"loss": kto_loss(log_probs, given["ref"], given["desirable"], kl, **settings).mean()}


def ours_orpo(given: Tensors, settings: Settings) -> Tensors:
    tokens = given["tokens"]
    log_probs = token_log_probs(1.0 * given["logits"].flatten(0, 1), tokens.flatten()).view(tokens.shape)
    chosen, rejected = (masked_sum(log_probs, given["mask"], dim=1) / given["mask"].sum(1)).chunk(2)
    return {"loss": orpo_loss(chosen, rejected, -chosen, **settings).mean()}


def ours_reward(given: Tensors, settings: Settings) -> Tensors:
    margin = given["margin"] if settings["margin"] else None
    centre = settings["center_coefficient"] or 0.0
    return {"loss": reward_loss(given["chosen"], given["rejected"], margin, center_coefficient=centre).mean()}


def ours_advantages(given: Tensors, settings: Settings) -> Tensors:
    found = group_advantages(given["rewards"], settings["group_size"], settings["baseline"])
    return {"loss": (given["pull"] * found).sum(), "advantages": found}


def ours_grpo(given: Tensors, settings: Settings) -> Tensors:
    """By the method's own loss, of micro-batches of whole responses; that of PPO where a bound is PPO's alone."""
    lengths = given["mask"].sum(1)
    made = rollouts(given["advantages"], lengths)
    bounds = {"clipLow": settings["clip_low"], "clipHigh": settings["clip_high"]}
    weighing = {"aggregation": settings["aggregation"], "sampling": {"maxNewTokens": settings["max_length"]}}
    of_grpo = bounds | weighing | {"klCoefficient": settings["beta"], "groupSize": 2, "passes": 2}
    said, _ = grpo(ToldModels(), **of_grpo)._weigh(made, [Judged(None, None, None)] * len(made))
    token_weights = [one.weights for one in said]
    totals, clipped, num_tokens = [], 0.0, int(lengths.sum())
    for rows in torch.split(torch.arange(len(made)), PAIRS - 2):
        held = given["mask"][rows]
        models = ToldModels(given["log_probs"][rows][held])
        batch = experience(
            advantages=given["advantages"][rows, None].expand(held.shape)[held],
            weights=torch.cat([token_weights[row] for row in rows]),
            old_log_probs=given["old"][rows][held],
            ref_log_probs=given["ref"][rows][held],
            importance=given["weights"][rows][held] if settings["weighted"] else None,
        )
        if settings.get("dual_clip"):
            found = ppo(models, dualClip=settings["dual_clip"], **bounds)._loss_of_policy(batch)
        else:
            found = grpo(models, **of_grpo).loss(torch.nn.Identity(), batch)
        totals.append(found.total)
        clipped += float(found.sums[0])
    loss = torch.stack(totals).sum() / (num_tokens if settings["aggregation"] == "token" else len(made))
    return (
        {"loss": loss} if settings.get("dual_clip") else {"loss": loss, "clipfrac": torch.tensor(clipped / num_tokens)}
    )


def ours_divergence(given: Tensors, settings: Settings) -> Tensors:
    arguments = {"beta": settings["beta"], "temperature": settings["temperature"]}
    return {"loss": divergence(given["student"], given["teacher"], chunk_elements=4 * WORDS, **arguments).mean()}


OURS: dict[str, Callable[[Tensors, Settings], Tensors]] = {
    "log_probs": ours_log_probs,
    "dpo": ours_dpo,
    "kto": ours_kto,
    "orpo": ours_orpo,
    "reward": ours_reward,
    "advantages": ours_advantages,
    "grpo": ours_grpo,
    "divergence": ours_divergence,
}


def ours(case: Case, given: Tensors) -> Tensors:
    for name in case.learn:
        given[name].requires_grad_()
    found = OURS[case.kind](given, case.settings)
    pulls = torch.autograd.grad(found["loss"], [given[name] for name in case.learn])
    return found | {f"grad_{name}": pull for name, pull in zip(case.learn, pulls, strict=True)}


def theirs(wanted: list[Case], drawn: dict[str, Tensors], folder: Path) -> Tensors:
    """What TRL finds, by "case/result"."""
    interpreter = subprocess.run([HERE / "trl_env.sh"], check=True, capture_output=True, text=True).stdout.strip()
    names = [folder / name for name in ("cases.json", "given.safetensors", "found.safetensors")]
    names[0].write_text(json.dumps([asdict(case) for case in wanted]))
    save_file({f"{name}/{tensor}": value for name, given in drawn.items() for tensor, value in given.items()}, names[1])
    command = [interpreter, str(HERE / "baselines" / "trl_losses.py"), *map(str, names)]
    timed_process(command, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, folder / "process.log")
    return load_file(names[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    draws = parser.parse_args().draws
    generator = torch.Generator().manual_seed(0)
    # A name holds its draw: TRL is started once for all.
    wanted = [
        Case(f"{case.name}#{number}", case.kind, case.settings, case.learn)
        for case in cases()
        for number in range(draws)
    ]
    drawn = {case.name: draw(case, generator) for case in wanted}
    with tempfile.TemporaryDirectory(prefix="bench-rl-parity-") as name:
        peer = theirs(wanted, drawn, Path(name))
    worst: dict[str, dict[str, float]] = {}
    for case in wanted:
        largest = worst.setdefault(case.name.split("#")[0], {})
        for figure, value in ours(case, drawn[case.name]).items():
            difference = float((value.detach() - peer[f"{case.name}/{figure}"]).abs().max())
            # A comparison with NaN is false, so that NaN would pass for agreement.
            largest[figure] = max(largest.get(figure, 0.0), difference if math.isfinite(difference) else math.inf)
    write_results("rl_parity", {"goal": GOAL, "draws": draws, "largest_difference": worst})
    for loss, figures in worst.items():
        print(f"{loss:<20}" + ", ".join(f"{figure} within {value:.1e}" for figure, value in figures.items()))
    largest_of_all = max(value for figures in worst.values() for value in figures.values())
    print(f"largest difference in {draws} draws of {len(worst)} losses: {largest_of_all:.1e} (goal {GOAL:.0e})")
    return int(largest_of_all > GOAL)


if __name__ == "__main__":
    sys.exit(main())
