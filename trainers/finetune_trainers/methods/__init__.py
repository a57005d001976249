"""The ways in which a model can learn. A method supplies batches and a loss; the loop does the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from finetune_trainers.data.batches import Batch, StepBatches

__all__ = ["BatchLoss", "Method"]


class BatchLoss(NamedTuple):
    """What a method says of one micro-batch."""

    total: Tensor
    """The summed loss: fp32, no dimensions, with a gradient."""
    sums: Tensor
    """float64 [num_sums], without gradient: what `figures` is made of when it is summed over the global batch."""


class Method(Protocol):
    """What the loop asks of a method."""

    num_sums: int

    def step(self, step: int) -> StepBatches | None:
        """This rank's micro-batches of optimizer step `step` (0-based), and the whole step's counts. Collective: called
        on every rank before the step's first forward pass. None, on all ranks: a stop was asked for while the method
        made what it learns from; it is as it was before."""
        ...

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        """The summed loss of one micro-batch; the loop divides by the step's divisor."""
        ...

    def losses(self, module: nn.Module, batch: Batch) -> Iterator[BatchLoss]:
        """The same in parts that share no activations. Each may be learned from before the next is computed, so that
        the activations of one part alone exist."""
        yield self.loss(module, batch)

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """The method's own figures of a step or an evaluation, of sums over all micro-batches and ranks."""
        ...

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Figures of the evaluation data, eval_loss among them where it could be had. Collective, the same on every
        rank."""
        ...

    def confirm(self, step: int) -> None:
        """The model as it is after `step` steps is about to be kept: raises TrainerError where it should not be.
        Collective."""
        return

    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote in the last evaluation, for people to read: on rank 0, at least."""
        return []

    def lasting(self) -> dict[str, Any]:
        """Fields of Progress that hold until it says otherwise; every report has them."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the method would need to know, beside the model, if it went on in another process: JSON, small."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        return

    def wind_down(self) -> None:
        """No step and no evaluation comes any more: give back what only they need. `confirm` may come."""
        return

    def close(self) -> None:
        """The training is over. May be called twice."""
        return
