"""The peer: TRL's losses on given tensors. Runs in TRL's environment, never in ours.

    python trl_losses.py CASES.json GIVEN.safetensors FOUND.safetensors

CASES: [{"name", "kind", "settings", "learn"}]. GIVEN: tensors named "case/tensor". FOUND: for each case the loss, what
else TRL reports, and the gradient of the loss by each tensor that is learned: "case/loss", "case/grad_...".

TRL's losses are methods of its trainers, which want models and data sets. Here each is called on a bare stand-in that
has the attributes which the method reads, and whose model answers with the given log-probabilities: the arithmetic is
TRL's own, line by line. The group advantage TRL computes amid generating: those lines are taken out of its source as
they stand, and run. Called by bench_rl_parity.
"""

import inspect
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss
from trl.trainer.utils import entropy_from_logits, nanstd, selective_log_softmax


def trainer(**attributes):
    """What the methods read of themselves; evaluation mode, so that nothing is divided by accumulation."""
    alone = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    return SimpleNamespace(
        accelerator=alone,
        model=SimpleNamespace(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        **attributes,
    )


def model_of(log_probs):
    """Answers every question with `log_probs` [B, T]. TRL's models answer 0 for tokens that are not learned."""
    nothing = torch.zeros_like(log_probs.detach())
    answer = SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=torch.zeros_like(nothing, dtype=torch.bool)
    )
    return lambda **inputs: answer


def whole(mask):
    """Mask of the tokens [B, T + 1] for one of the predictions [B, T]: the first token is the prompt."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()


def log_probs(given, settings):
    logits = given["logits"]
    found = selective_log_softmax(logits, given["tokens"], temperature=settings["temperature"])
    entropy = entropy_from_logits(logits / settings["temperature"])
    return {"loss": (found * given["pull"]).sum(), "log_probs": found, "entropy": entropy}


def dpo(given, settings):
    this = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[settings["trl"]],
        loss_weights=[1.0],
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        use_weighting=False,
    )

    def loss(rows):
        mask = whole(given["mask"][rows])
        chosen, rejected = given["ref"][rows].chunk(2)
        inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        return DPOTrainer._compute_loss(this, model_of((given["log_probs"] * given["mask"])[rows]), inputs, False)

    pairs = len(given["ref"]) // 2
    if settings["trl"] != "aot":
        return {"loss": loss(torch.arange(2 * pairs))}
    # TRL gave label smoothing up in "sigmoid". "aot" still has it, and is the same where one pair is alone.
    return {"loss": sum(loss(torch.tensor([pair, pairs + pair])) for pair in range(pairs)) / pairs}


def kto(given, settings):
    this = trainer(
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: batch["KL_logps"],
        loss_type="kto",
        beta=settings["beta"],
        desirable_weight=settings["desirable_weight"],
        undesirable_weight=settings["undesirable_weight"],
    )
    mask = whole(given["mask"])
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"label": given["desirable"], "ref_logps": given["ref"]}
    inputs |= {"KL_logps": given["mismatched"], "ref_KL_logps": given["ref_mismatched"]}
    return {"loss": KTOTrainer._compute_loss(this, model_of(given["log_probs"] * given["mask"]), inputs, False)}


def orpo(given, settings):
    """Pair by pair: TRL's likelihood of the chosen answers is a mean over the tokens of the batch, prompts included.
    Here a prompt is one token, which nothing predicts."""
    pairs = len(given["logits"]) // 2
    mask = given["mask"].bool()
    tokens = torch.cat([torch.zeros_like(given["tokens"][:, :1]), given["tokens"]], dim=1)

    def loss(pair):
        batch, logits = {}, []
        for way, row in {"chosen": pair, "rejected": pairs + pair}.items():
            length = int(mask[row].sum()) + 1
            ids = tokens[row : row + 1, :length]
            labels = ids.clone()
            labels[:, 0] = -100
            batch |= {f"{way}_input_ids": ids, f"{way}_attention_mask": torch.ones_like(ids), f"{way}_labels": labels}
            logits.append(given["logits"][row])
        this = trainer(beta=settings["beta"], is_encoder_decoder=False, padding_value=0)
        for name in ("concatenated_forward", "odds_ratio_loss"):
            setattr(this, name, getattr(ORPOTrainer, name).__get__(this))
        this.concatenated_inputs, this.get_batch_logps = ORPOTrainer.concatenated_inputs, ORPOTrainer.get_batch_logps

        def model(input_ids, **more):  # what follows the last token is not looked at
            held = torch.stack(logits)[:, : input_ids.shape[1] - 1]
            return SimpleNamespace(logits=torch.cat([held, torch.zeros_like(held[:, :1])], dim=1))

        return ORPOTrainer.get_batch_loss_metrics(this, model, batch)[0]

    return {"loss": sum(loss(pair) for pair in range(pairs)) / pairs}


def advantages(given, settings):
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).splitlines()
    first, last = (
        next(number for number, line in enumerate(lines) if line.strip().startswith(beginning))
        for beginning in ("unscorable_mask =", "advantages = torch.nan_to_num(")
    )
    rewards = given["rewards"]
    this = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1, dtype=rewards.dtype),
        scale_rewards=settings["trl"],
    )
    names = {"self": this, "rewards_per_func": rewards[:, None], "num_generations": settings["group_size"]}
    names |= {"torch": torch, "nanstd": nanstd, "device": rewards.device}
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), names)
    return {"loss": (given["pull"] * names["advantages"]).sum(), "advantages": names["advantages"]}


def reward(given, settings):
    this = trainer(args=SimpleNamespace(center_rewards_coefficient=settings["center_coefficient"]))
    scores = torch.cat([given["chosen"], given["rejected"]])[:, None]
    inputs = {"margin": given["margin"]} if settings["margin"] else {}
    return {"loss": RewardTrainer.compute_loss(this, lambda **inputs: SimpleNamespace(logits=scores), inputs)}


def grpo(given, settings):
    mask = given["mask"].long()
    this = trainer(
        _get_per_token_logps_and_entropies=lambda *inputs, **more: (given["log_probs"], torch.zeros_like(mask), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=settings["beta"],
        args=SimpleNamespace(use_bias_correction_kl=False, delta=settings.get("dual_clip")),
        loss_type=settings["trl"],
        epsilon_low=settings["clip_low"],
        epsilon_high=settings["clip_high"],
        use_vllm=settings["weighted"],
        vllm_importance_sampling_correction=True,
        max_completion_length=settings["max_length"],
        _entropy_bonus_enabled=False,
    )
    prompt = torch.ones_like(mask[:, :1])
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask}
    inputs |= {"advantages": given["advantages"], "old_per_token_logps": given["old"]}
    inputs |= {"ref_per_token_logps": given["ref"], "importance_sampling_ratio": given["weights"]}
    inputs |= {"num_items_in_batch": mask.sum()}
    found = {"loss": GRPOTrainer._compute_loss(this, None, inputs)}
    if settings.get("dual_clip") is None:  # TRL does not count what that bound decides
        found["clipfrac"] = torch.tensor(this._metrics["eval"]["clip_ratio/region_mean"][0])
    return found


def divergence(given, settings):
    arguments = {"beta": settings["beta"], "temperature": settings["temperature"]}
    student, teacher = given["student"], given["teacher"]
    if settings["trl"] == "gkd":
        return {"loss": GKDTrainer.generalized_jsd_loss(student, teacher, reduction="batchmean", **arguments)}
    # DistillationTrainer applies the output head itself: one that changes nothing makes hidden states of logits.
    head, mask = torch.eye(student.shape[-1], dtype=student.dtype), torch.ones(1, len(student))
    found = _chunked_divergence_loss(student[None], teacher[None], head, head, mask, **arguments)
    return {"loss": found[0]}


LOSSES = {function.__name__: function for function in (log_probs, dpo, kto, orpo, reward, advantages, grpo, divergence)}


def main():
    cases, tensors = json.loads(Path(sys.argv[1]).read_text()), load_file(sys.argv[2])
    results = {}
    for case in cases:
        prefix = case["name"] + "/"
        given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for name in case["learn"]:
            given[name].requires_grad_()
        found = LOSSES[case["kind"]](given, case["settings"])
        found["loss"].backward()
        found |= {f"grad_{name}": given[name].grad for name in case["learn"]}
        results |= {prefix + name: tensor.detach().double().contiguous() for name, tensor in found.items()}
    save_file(results, sys.argv[3])


if __name__ == "__main__":
    main()
