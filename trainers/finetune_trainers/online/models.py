"""What policy, reference and critic say of the tokens of a batch. Called by the online methods.

K  tokens that the policy chose, of all documents of a micro-batch, in order
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.online.adapters import Adapters
from finetune_trainers.resting import RestingWeights
from finetune_trainers.rl.distillation import divergence
from finetune_trainers.rl.logprobs import TokenStats, token_stats

__all__ = ["Models"]


class Models:
    """The models of one rank. Calls are collective where parameters are split over ranks."""

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | None,
        temperature: float,
        resting: RestingWeights | None = None,
    ) -> None:
        """`policy` is the engine's module, and the critic where it has one. `reference` is a frozen model; None: the
        policy without its adapters. `resting`: the reference's weights, where they are not always in memory.
        Log-probabilities are those at `temperature`."""
        self.policy, self._reference, self._temperature, self._resting = policy, reference, temperature, resting
        self._adapters = Adapters(policy)

    def reference_at_work(self) -> AbstractContextManager[None]:
        """Inside, the reference may be asked."""
        return nullcontext() if self._resting is None else self._resting.at_work()

    def stats(self, batch: Batch) -> TokenStats:
        """The policy's, with a gradient where one is wanted."""
        return self._stats(self._logits(self.policy, batch), batch)

    def reference_stats(self, batch: Batch) -> TokenStats:
        """The reference's. Called without gradient, inside `reference_at_work`."""
        return self._stats(self._reference_logits(batch), batch)

    def distances(self, batch: Batch) -> Tensor:
        """fp32 [K]: KL(policy || reference) over all words, at each token. Called like `reference_stats`."""
        return divergence(
            self._logits(self.policy, batch), self._reference_logits(batch), beta=1.0, temperature=self._temperature
        )

    def values(self, batch: Batch) -> Tensor:
        """fp32 [K]: the critic's, before each of the tokens was chosen."""
        kwargs = forward_kwargs(batch)
        found: Tensor = self.policy(input_ids=batch.input_ids, values_at=kwargs.pop("logits_to_keep"), **kwargs)
        return found

    def _reference_logits(self, batch: Batch) -> Tensor:
        if self._reference is not None:
            return self._logits(self._reference, batch)
        with self._adapters.base_alone():
            return self._logits(self.policy, batch)

    def _stats(self, logits: Tensor, batch: Batch) -> TokenStats:
        return token_stats(logits, batch.labels[batch.labels != IGNORED], self._temperature)

    @staticmethod
    def _logits(module: nn.Module, batch: Batch) -> Tensor:
        """[K, V]: of the trained positions."""
        output: Any = module(input_ids=batch.input_ids, **forward_kwargs(batch))
        logits: Tensor = output.logits[0]
        return logits
