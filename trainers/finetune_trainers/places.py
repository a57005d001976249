"""Where claims, installed packages and the cache are on this machine, and back: for sources of models and data, and
results. And how a folder comes to a place."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["appearing_whole", "cache_folder", "claim_folder", "package_folder", "uri_of"]


@contextmanager
def appearing_whole(folder: Path, *, others_will_do: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well: it is there whole, or not.

    `others_will_do`: of processes that write the same at the same time, the first one's stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp lets nobody else in, and the folder may be shared by users of one volume
        try:
            unfinished.rename(folder)
        except OSError:
            if not (others_will_do and folder.is_dir()):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
