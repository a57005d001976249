"""Engines: what turns the gradient of a loss into an update of the parameters.

The loop knows this protocol only. `engine_torch` serves one process without ZeRO; `engine_deepspeed` the rest.

Both keep one promise: after the backward passes of a step, the gradient is exactly sum(loss) / N, where the sum runs
over all micro-batches and ranks and N is what the whole global batch counts for: its trained tokens, or its pairs.
Neither the number of workers nor of accumulation steps shows in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_trainers.context import WorkerContext
from finetune_trainers.tuning import TunedModel

__all__ = ["Engine", "build_engine", "opening_fractions"]


class Engine(Protocol):
    """A model with its optimizer."""

    module: nn.Module
    """Call it for the forward pass; it takes the model's own arguments."""
    device: torch.device
    takes_parts: bool
    """`backward` may be called for each part of a micro-batch's loss, before the next part is computed."""

    def begin_step(self, learning_rate: float, done: float) -> None:
        """Set the rate of the coming step. `done` is the fraction of all steps already made: groups of progressive
        unfreezing open by it."""
        ...

    def backward(self, loss_sum: Tensor, divisor: int) -> None:
        """Add the gradient of `loss_sum` / `divisor`. Call it once per micro-batch, or part of one where the engine
        takes parts, on every rank."""
        ...

    def step(self) -> float | None:
        """Clip, update, clear the gradient; returns its norm before clipping.

        None: fp16 overflowed, the update was left out and the loss scale lowered, which is part of fp16 training.
        Raises NonFiniteLossError, before the update, when the gradient is NaN or infinite in any other precision.
        """
        ...

    def parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name in the tuned module, whole tensor on the CPU) of the parameters in `names`, or of all.

        Every rank must run it to its end, since ZeRO-3 gathers; rank 0 alone is given the tensors.
        """
        ...

    def close(self) -> None:
        """Training is over: parameters can still be read, and other models be built. May be called twice."""
        ...


def build_engine(tuned: TunedModel, plan: RunPlan, context: WorkerContext) -> Engine:
    """The engine that the plan names. Collective."""
    if plan.optimization.activation_checkpointing:
        checkpoint_activations(tuned.model, reentrant=plan.deepspeed.zero_stage == 3)
    if plan.deepspeed.engine == "torch":
        from finetune_trainers.engine_torch import TorchEngine

        return TorchEngine(tuned, plan, context)
    from finetune_trainers.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(tuned, plan, context)


def opening_fractions(tuned: TunedModel) -> dict[str, float]:
    """Name -> fraction of the steps from which it learns, for the parameters that do not learn at once."""
    groups = tuned.unfreeze.groups if tuned.unfreeze is not None else []
    return {name: at for at, names in groups for name in names}


def checkpoint_activations(model: nn.Module, reentrant: bool) -> None:
    """Keep only the input of each layer and recompute the rest in the backward pass.

    The non-reentrant kind compares the shapes of saved tensors, which ZeRO-3 changes by gathering and releasing
    parameters in between; there the reentrant kind is right, and it needs an input that carries a gradient.
    """
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore[operator]
    if reentrant:
        model.enable_input_require_grads()  # type: ignore[operator]
