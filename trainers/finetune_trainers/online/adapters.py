"""Several adapters on one frozen base, and which of them is in use.

PEFT's own switches turn gradients on and off as well, which is not theirs to decide here: the engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from finetune_trainers.lean_peft import peft

__all__ = ["Adapters"]


class Adapters:
    """Those of one model. The one that is in use otherwise is the policy's."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
        ]
        self._blocks: list[Any] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    @contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """`adapter` and no other is in use inside, and again when the backward pass computes this part anew."""
        recompute = [getattr(block, _RECOMPUTE, None) for block in self._blocks]
        for block, function in zip(self._blocks, recompute, strict=True):
            if function is not None:
                setattr(block, _RECOMPUTE, self._with(adapter, function))
        try:
            with self._only(adapter):
                yield
        finally:
            for block, function in zip(self._blocks, recompute, strict=True):
                if function is not None:
                    setattr(block, _RECOMPUTE, function)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """No adapter is in use inside: the model is what it was before training."""
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer._disable_adapters = False

    def _with(self, adapter: str, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint_with_adapter(part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*inputs: Any, **settings: Any) -> Any:
                with self._only(adapter):
                    return part(*inputs, **settings)

            return checkpoint(run, *args, **kwargs)

        return checkpoint_with_adapter

    @contextmanager
    def _only(self, adapter: str) -> Iterator[None]:
        before = [layer._active_adapter for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = [adapter]
        try:
            yield
        finally:
            for layer, names in zip(self._layers, before, strict=True):
                layer._active_adapter = names


_RECOMPUTE = "_gradient_checkpointing_func"
"""transformers' name for what each block calls its layers by, once activations are recomputed."""
