"""GRPO and its relatives: an answer's advantage is how much better it is than the others to the same prompt.

Dr. GRPO, RLOO and DAPO are settings of it. `K` are the tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from finetune_api.spec import Grpo as GrpoSettings
from finetune_trainers.data.batches import Batch
from finetune_trainers.methods import BatchLoss
from finetune_trainers.online.episodes import Experience, Rollout, Said
from finetune_trainers.online.method import Asked, Judged, Online, Parts
from finetune_trainers.rl.advantages import group_advantages, informative_groups
from finetune_trainers.rl.aggregation import counts_tokens, token_weights
from finetune_trainers.rl.kl import kl_estimate
from finetune_trainers.rl.policy_losses import ppo_policy_loss
from finetune_trainers.rl.rewards import overlong_penalty

__all__ = ["Grpo"]


class Grpo(Online):
    """Group relative policy optimisation."""

    num_sums = 5

    def __init__(self, settings: GrpoSettings, parts: Parts) -> None:
        # In the only step of an iteration the policy is still the one that wrote: its ratio to itself is 1.
        asks_policy = settings.steps_per_iteration > 1 or bool(settings.max_kl) or not parts.engine.is_policy
        super().__init__(settings, parts, Asked(asks_policy, settings.needs_reference, critic=False))
        self._grpo = settings
        self._counts_tokens = counts_tokens(settings.aggregation)
        self._more_rounds = settings.dynamic_sampling

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        assert isinstance(batch, Experience)
        said = self._parts.models.stats(batch)
        new = said.log_probs  # [K]
        if not new.numel():
            return BatchLoss(new.sum(), torch.zeros(self.num_sums, dtype=torch.float64, device=new.device))
        assert batch.advantages is not None
        assert batch.weights is not None
        old = batch.old_log_probs if batch.old_log_probs is not None else new.detach()
        mask = torch.ones_like(new, dtype=torch.bool)[None]
        found = ppo_policy_loss(
            new[None],
            old[None],
            batch.advantages[None],
            mask,
            clip_low=self._grpo.clip_low,
            clip_high=self._grpo.clip_high,
            weights=None if batch.importance is None else batch.importance[None],
        )
        losses, kl = found.losses[0], new.new_zeros(())
        if self._grpo.kl_coefficient and batch.ref_log_probs is not None:
            distance = kl_estimate(new, batch.ref_log_probs, "k3")
            losses, kl = losses + self._grpo.kl_coefficient * distance, distance.detach().sum()
        count = float(new.numel())
        of_tokens = [found.clipfrac * count, found.approx_kl * count, said.entropy.sum(), kl, kl.new_tensor(count)]
        return BatchLoss((losses * batch.weights).sum(), torch.stack(of_tokens).detach().double())

    def _figures(self, sums: Sequence[float]) -> dict[str, float]:
        *totals, count = sums
        clipped, approx_kl, entropy, kl = (total / max(count, 1.0) for total in totals)
        figures = {"clip_fraction": clipped, "approx_kl": approx_kl, "entropy": entropy}
        return figures | ({"kl": kl} if self._grpo.kl_coefficient else {})

    def _weigh(self, rollouts: list[Rollout], judged: list[Judged]) -> tuple[list[Said], dict[str, float]]:
        rewards = self._shaped(rollouts)
        size = self._grpo.group_size
        advantages = group_advantages(rewards, size, self._grpo.baseline)
        lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
        weights = token_weights(lengths, self._grpo.aggregation, max_length=self._grpo.sampling.max_new_tokens)
        said = [
            Said(
                advantages=advantage.float().expand(len(rollout.ids)),
                weights=weight.expand(len(rollout.ids)),
                log_probs=one.log_probs,
                reference=one.reference,
            )
            for rollout, advantage, weight, one in zip(rollouts, advantages, weights, judged, strict=True)
        ]
        return said, {"informative_groups": float(informative_groups(rewards, size).double().mean())}

    def _shaped(self, rollouts: Sequence[Rollout]) -> Tensor:
        rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
        if not self._grpo.overlong_buffer:
            return rewards
        lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
        longest = self._grpo.sampling.max_new_tokens
        return rewards + overlong_penalty(lengths, max_length=longest, buffer=self._grpo.overlong_buffer)

    def _is_worth_learning(self, group: Sequence[Rollout]) -> bool:
        rewards = torch.tensor([rollout.reward for rollout in group], dtype=torch.float64)
        return not self._more_rounds or bool(informative_groups(rewards, len(group)).all())
