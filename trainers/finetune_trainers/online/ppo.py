"""PPO for language models: a reward at the end of each answer, the price of straying from the reference at each token,
and a critic that says which tokens earned it.

    N  rollouts of an iteration      T  tokens of the longest answer      K  tokens of a micro-batch
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from finetune_api.spec import Ppo as PpoSettings
from finetune_trainers.data.batches import Batch
from finetune_trainers.methods import BatchLoss
from finetune_trainers.online.episodes import Experience, Rollout, Said
from finetune_trainers.online.memory import give_back
from finetune_trainers.online.method import Asked, Judged, Online, Parts
from finetune_trainers.rl.advantages import gae, mask_of_lengths
from finetune_trainers.rl.kl import AdaptiveKl, FixedKl, KlController, controller_from_state, kl_estimate
from finetune_trainers.rl.policy_losses import ppo_policy_loss
from finetune_trainers.rl.rewards import clip_scores, normalise_scores, token_rewards
from finetune_trainers.rl.statistics import Moments, masked_mean, whiten
from finetune_trainers.rl.value_losses import explained_variance, value_loss

__all__ = ["Ppo"]


class Ppo(Online):
    """Proximal policy optimisation."""

    num_sums = 6

    def __init__(self, settings: PpoSettings, parts: Parts) -> None:
        super().__init__(settings, parts, Asked(policy=True, reference=settings.needs_reference, critic=True))
        self._ppo = settings
        self._kl = _controller(settings)
        self._seen = Moments()
        """Of all rewards so far."""
        self._strayed = False
        """A step of this iteration went farther than stopKl."""

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        assert isinstance(batch, Experience)
        of_policy, of_critic = self._loss_of_policy(batch), self._loss_of_critic(batch)
        return BatchLoss(of_policy.total + of_critic.total, of_policy.sums + of_critic.sums)

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[BatchLoss]:
        assert isinstance(batch, Experience)
        yield self._loss_of_policy(batch)
        give_back()  # its activations: the gradients, which stay, lie between them
        yield self._loss_of_critic(batch)

    def _loss_of_policy(self, batch: Experience) -> BatchLoss:
        said = self._parts.models.stats(batch)
        new = said.log_probs  # [K]
        if not new.numel():
            return self._counted(new.sum())
        assert batch.old_log_probs is not None
        assert batch.advantages is not None
        mask = torch.ones_like(new, dtype=torch.bool)[None]
        policy = ppo_policy_loss(
            new[None],
            batch.old_log_probs[None],
            batch.advantages[None],
            mask,
            clip_low=self._ppo.clip_low,
            clip_high=self._ppo.clip_high,
            dual_clip=self._ppo.dual_clip,
            weights=None if batch.importance is None else batch.importance[None],
        )
        total, count = policy.losses.sum(), new.new_tensor(float(new.numel()))
        of_tokens = [policy.clipfrac * count, policy.approx_kl * count, said.entropy.sum()]
        return self._counted(total, *of_tokens, count.new_zeros(()), total, count)

    def _loss_of_critic(self, batch: Experience) -> BatchLoss:
        values = self._parts.models.values(batch)  # [K]
        if not values.numel():
            return self._counted(values.sum())
        assert batch.old_values is not None
        assert batch.returns is not None
        mask = torch.ones_like(values, dtype=torch.bool)[None]
        found = value_loss(
            values[None], batch.old_values[None], batch.returns[None], mask, clip=self._ppo.critic.clip or None
        )
        total, none = found.losses.sum(), values.new_zeros(())
        return self._counted(self._ppo.critic.coefficient * total, none, none, none, total, none, none)

    def _counted(self, total: Tensor, *counts: Tensor) -> BatchLoss:
        """`counts` are as `_figures` reads them; nothing is counted where there are none."""
        if not counts:
            return BatchLoss(total, torch.zeros(self.num_sums, dtype=torch.float64, device=total.device))
        return BatchLoss(total, torch.stack(counts).detach().double())

    def _figures(self, sums: Sequence[float]) -> dict[str, float]:
        *totals, count = sums
        clipped, approx_kl, entropy, of_critic, of_policy = (total / max(count, 1.0) for total in totals)
        self._strayed |= self._ppo.stop_kl is not None and approx_kl > self._ppo.stop_kl
        return {
            "clip_fraction": clipped,
            "approx_kl": approx_kl,
            "entropy": entropy,
            "value_loss": of_critic,
            "policy_loss": of_policy,
        }

    def _is_to_stop(self) -> bool:
        return self._strayed

    def _weigh(self, rollouts: list[Rollout], judged: list[Judged]) -> tuple[list[Said], dict[str, float]]:
        log_probs, reference, values = (_padded(said) for said in zip(*judged, strict=True))  # [N, T]
        assert log_probs is not None
        assert values is not None
        lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
        mask = mask_of_lengths(lengths, log_probs.shape[1])
        kl = torch.zeros_like(log_probs)
        if reference is not None:
            kl = torch.where(mask, kl_estimate(log_probs, reference, "k1"), 0.0)
        scores = self._shaped(rollouts)
        rewards = token_rewards(scores, mask, kl, self._kl.coefficient)
        found = gae(rewards, values, mask, gamma=self._ppo.gamma, lam=self._ppo.gae_lambda)
        advantages = whiten(found.advantages, mask) if self._ppo.whiten_advantages else found.advantages
        figures = {"kl_coefficient": self._kl.coefficient, "values": float(masked_mean(values, mask))}
        explained = float(explained_variance(values, found.returns, mask))
        if math.isfinite(explained):
            figures["explained_variance"] = explained
        self._kl = self._kl.updated(float(kl.sum(1).mean()), len(rollouts))
        self._strayed = False
        said = [
            Said(
                advantages=advantages[row, :length],
                weights=torch.ones(length),
                log_probs=log_probs[row, :length],
                reference=None if reference is None else reference[row, :length],
                values=values[row, :length],
                returns=found.returns[row, :length],
            )
            for row, length in enumerate(lengths.tolist())
        ]
        return said, figures

    def _shaped(self, rollouts: Sequence[Rollout]) -> Tensor:
        """fp32 [N]: the scores as they are learned from. One that could not be had is the mean of the others."""
        scores = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32)
        unknown = scores.isnan()
        scores = torch.where(unknown, scores[~unknown].mean(), scores)
        if self._ppo.normalize_rewards:
            scores, self._seen = normalise_scores(scores, self._seen)
        return scores if self._ppo.reward_clip is None else clip_scores(scores, self._ppo.reward_clip)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kl": self._kl.state(), "rewards": self._seen.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if "kl" in state:
            self._kl = controller_from_state(state["kl"])
            self._seen = Moments(**state["rewards"])


def _padded(said: Sequence[Tensor | None]) -> Tensor | None:
    """[N, T] of N times [n]; None where nobody was asked."""
    known = [of for of in said if of is not None]
    return pad_sequence(known, batch_first=True) if known else None


def _controller(settings: PpoSettings) -> KlController:
    kl = settings.kl
    if kl.target is None:
        return FixedKl(kl.coefficient)
    return AdaptiveKl(kl.coefficient, kl.target, kl.horizon)
