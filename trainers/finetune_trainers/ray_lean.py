"""Ray Train without the helpers that one machine has no use for. Used by `ray_workers` on a Ray of our own.

Beside the controller and the workers, Ray Train 2.60 starts a process each for datasets (we pass none), for asking an
autoscaler for nodes (there is none) and for cleaning up after a controller that died (this Ray dies with us). Each
takes seconds to import Ray Data, in the middle of the way to the first step. Ray has no public switch for them, so
this leans on its internals, and only of the version that `ray_workers` says it was written for.
"""

from __future__ import annotations

import importlib
from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

__all__ = ["LeanTorchTrainer"]

_UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)
# Ray's annotations still describe the first version of Ray Train; what runs is the second.
_TorchTrainer: Any = importlib.import_module("ray.train.v2.torch.torch_trainer").TorchTrainer
_FixedScalingPolicy: Any = importlib.import_module(
    "ray.train.v2._internal.execution.scaling_policy.fixed"
).FixedScalingPolicy


class FixedWithoutAutoscaler(_FixedScalingPolicy):  # type: ignore[misc]
    """The number of workers that was asked for, and nobody to ask for machines."""

    def after_controller_start(self, train_run_context: Any) -> None:
        return None

    def _maybe_send_resource_request(self) -> None:
        return None


class LeanTorchTrainer(_TorchTrainer):  # type: ignore[misc]
    """TorchTrainer with the controller and the workers only."""

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, _UNUSED)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["scaling_policy"] = FixedWithoutAutoscaler(scaling_config=self.scaling_config)
        return super()._initialize_and_run_controller(**settings)
