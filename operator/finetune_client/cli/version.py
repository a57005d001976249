"""`finetune version`: what is installed, read from package metadata without importing anything heavy."""

from __future__ import annotations

import json
import platform
from importlib import metadata

__all__ = ["show_version"]

_DISTRIBUTION = "finetune-operator"
_ENGINES = ("ray", "torch", "deepspeed", "transformers", "peft")


def show_version(as_json: bool) -> None:
    """Print versions; a package that is not installed is null."""
    versions = {
        _DISTRIBUTION: _version(_DISTRIBUTION),
        "python": platform.python_version(),
        **{name: _version(name) for name in _ENGINES},
    }
    if as_json:
        print(json.dumps(versions, indent=2))
        return
    for name, version in versions.items():
        print(f"{name:<18} {version or 'not installed'}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
