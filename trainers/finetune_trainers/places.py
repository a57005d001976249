"""Where claims, installed packages and the cache are on this machine, and back: for sources of models and data, and
results."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["cache_folder", "claim_folder", "package_folder", "uri_of"]


def cache_folder() -> Path:
    """Where unpacked models and tokenized data are kept from run to run."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune").absolute()


def claim_folder(claim: str) -> Path:
    """Where a PersistentVolumeClaim is mounted, whether or not it is."""
    return _claims() / claim


def uri_of(folder: Path) -> str:
    """What others call a folder of this machine's disk: on a claim by the claim, for it may be mounted elsewhere there.

    A job that begins with another one's model knows by this name which claim it has to mount.
    """
    absolute = folder.absolute()
    if absolute.is_relative_to(_claims()) and absolute != _claims():
        return f"pvc://{absolute.relative_to(_claims())}"
    return absolute.as_uri()


def _claims() -> Path:
    return Path(os.environ.get("FINETUNE_PVC_ROOT", "/mnt/pvc"))


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
