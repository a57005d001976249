"""The online methods' own code on tensors that are given, without a model: for the benches that compare with TRL.

K  tokens of all responses, end to end
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from finetune_api.spec import Grpo as GrpoSettings
from finetune_api.spec import Ppo as PpoSettings
from finetune_trainers.data.batches import dummy_batch
from finetune_trainers.data.questions import Question
from finetune_trainers.online.episodes import Experience, Rollout
from finetune_trainers.online.grpo import Grpo
from finetune_trainers.online.method import Parts
from finetune_trainers.online.ppo import Ppo
from finetune_trainers.rl.logprobs import TokenStats

__all__ = ["ToldModels", "experience", "grpo", "ppo", "rollouts"]

_REQUIRED: dict[str, Any] = {"maxSeqLength": 1024, "rewards": [{"metric": {"kind": "exact-match"}}]}


class ToldModels:
    """Policy and critic that say, of whatever batch, what they were told."""

    def __init__(self, log_probs: Tensor | None = None, values: Tensor | None = None) -> None:
        """[K] each."""
        self._log_probs, self._values = log_probs, values

    def stats(self, batch: object) -> TokenStats:
        assert self._log_probs is not None
        return TokenStats(self._log_probs, torch.zeros_like(self._log_probs))

    def values(self, batch: object) -> Tensor:
        assert self._values is not None
        return self._values


def grpo(models: ToldModels, **settings: Any) -> Grpo:
    """GRPO as the trainer has it; `settings` as in a job."""
    return Grpo(GrpoSettings.model_validate(_REQUIRED | settings), _parts(models))


def ppo(models: ToldModels, **settings: Any) -> Ppo:
    """PPO, likewise."""
    return Ppo(PpoSettings.model_validate(_REQUIRED | settings), _parts(models))


def experience(**known: Tensor | None) -> Experience:
    """A micro-batch of which `known` is [K] each."""
    return Experience(**{**vars(dummy_batch()), **known})


def rollouts(rewards: Tensor, lengths: Tensor) -> list[Rollout]:
    """Of `rewards` [B] and as many tokens as `lengths` [B]."""
    question = Question([0], [], {}, 0, 0)
    return [
        Rollout(question, 0, [0] * length, True, "", reward, {})
        for reward, length in zip(rewards.tolist(), lengths.tolist(), strict=True)
    ]


def _parts(models: ToldModels) -> Parts:
    """All that is asked of them here."""
    return cast(Parts, SimpleNamespace(models=models, engine=SimpleNamespace(is_policy=True), context=None))
