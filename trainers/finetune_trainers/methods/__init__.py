"""The ways in which a model can learn. A method supplies batches and a loss; the loop does the rest."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from finetune_trainers.data.batches import Batch, StepBatches

__all__ = ["Method"]


class Method(Protocol):
    """What the loop asks of a method."""

    def step(self, step: int) -> StepBatches:
        """This rank's micro-batches of optimizer step `step` (0-based), and the whole step's token counts."""
        ...

    def loss_sum(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """The summed loss of one micro-batch, fp32 scalar with a gradient."""
        ...
