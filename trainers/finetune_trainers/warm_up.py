"""Imported by Ray's worker processes as they start (`ray_warm` says so): what they will need anyway, ahead of time.

A process that will train has FINETUNE_WARM_UP in its environment and imports torch, transformers and the engine while
the launcher still looks at the data. The first of the others becomes Ray Train's controller; the rest need nothing.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

CONTROLLER = "ray.train.v2._internal.execution.controller.controller,finetune_trainers.ray_lean"


def _modules() -> str:
    if training := os.environ.get("FINETUNE_WARM_UP"):
        return training
    try:
        Path(os.environ["FINETUNE_WARM_CONTROLLER"]).unlink()  # one process succeeds
    except (KeyError, OSError):
        return ""
    return CONTROLLER


for _module in filter(None, _modules().split(",")):
    importlib.import_module(_module)
