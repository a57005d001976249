"""The policy without dropout. Called when the model of an online method is loaded.

What a policy said when it wrote is asked without dropout, and its answers are drawn without it. Were it to learn with
dropout, the ratio of the two would differ from 1 before anything is learned, by noise that is bounded, weighed and
measured as if the policy had moved.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

__all__ = ["disable_dropout"]

_log = logging.getLogger(__name__)


def disable_dropout(model: nn.Module, tells: bool = True) -> None:
    """Set every probability of dropping something in `model` to 0: of its layers, where a module keeps one as a number,
    as attention does, and in the configuration, of which some models, as Falcon, ask in each forward pass. The artifact
    has the configuration of the files that the model came from. `tells`: it is logged if there was any."""
    largest = 0.0
    for place in _places(model):
        names = [name for name, value in vars(place).items() if "drop" in name and isinstance(value, float)]
        for name in [*names, *(["p"] if isinstance(place, _DropoutNd) else [])]:
            largest = max(largest, getattr(place, name))
            setattr(place, name, 0.0)
    if largest and tells:
        _log.info(
            "Dropout of up to %g is off: with it, the policy that learns would not be the one that wrote", largest
        )


def _places(model: nn.Module) -> Iterator[nn.Module | PreTrainedConfig]:
    for module in model.modules():
        yield module
        if isinstance(config := vars(module).get("config"), PreTrainedConfig):
            yield config
