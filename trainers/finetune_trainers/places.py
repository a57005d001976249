"""Where claims and installed packages are on this machine's disk: what the sources of models and of data share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["claim_folder", "package_folder"]


def claim_folder(claim: str) -> Path:
    """Where a PersistentVolumeClaim is mounted, whether or not it is."""
    return Path(os.environ.get("FINETUNE_PVC_ROOT", "/mnt/pvc")) / claim


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, found without running any of its code; None when it is not installed."""
    top, *inner = package.split(".")
    try:
        # Only the top-level name is looked up: asking for a dotted name would import its parents.
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *inner)
