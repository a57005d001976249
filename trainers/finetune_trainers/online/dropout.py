"""The policy without dropout. Called when the model of an online method is loaded.

What a policy said when it wrote is asked without dropout, and its answers are drawn without it. Were it to learn with
dropout, the ratio of the two would differ from 1 before anything is learned, by noise that is bounded, weighed and
measured as if the policy had moved.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["disable_dropout"]

_log = logging.getLogger(__name__)


def disable_dropout(model: nn.Module, tells: bool = True) -> None:
    """Set every probability of dropping something in `model` to 0: of its layers, and where a module keeps one as a
    number, as attention does. `tells`: it is logged if there was any."""
    largest = 0.0
    for module in model.modules():
        names = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        for name in [*names, *(["p"] if isinstance(module, _DropoutNd) else [])]:
            largest = max(largest, getattr(module, name))
            setattr(module, name, 0.0)
    if largest and tells:
        _log.info(
            "Dropout of up to %g is off: with it, the policy that learns would not be the one that wrote", largest
        )
