"""PEFT, imported without bitsandbytes, which a run needs only where it quantizes.

PEFT imports bitsandbytes wherever it is installed, and that has torch compile functions which nobody will call: with
torch, transformers and PEFT it takes eight seconds of processor time to start a process, and with bitsandbytes
thirteen. Whoever needs PEFT takes it from here: `from finetune_trainers.lean_peft import peft`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["peft", "with_bitsandbytes"]


def _without_bitsandbytes() -> None:
    if "peft" in sys.modules or "bitsandbytes" in sys.modules:
        return
    modules: dict[str, Any] = sys.modules
    modules["bitsandbytes"] = None  # Python's own way to say that there is no such module
    try:
        for asked in _questions():
            asked()  # they remember their first answer
    finally:
        del modules["bitsandbytes"]


def _questions() -> list[Any]:
    """With which PEFT finds out what there is."""
    utils = importlib.import_module("peft.import_utils")
    return [utils.is_bnb_available, utils.is_bnb_4bit_available]


def with_bitsandbytes() -> None:
    """From now on PEFT knows layers that bitsandbytes has quantized. Raises ImportError when that is not installed."""
    importlib.import_module("peft.helpers").bnb = importlib.import_module("bitsandbytes")  # type: ignore[attr-defined]
    for asked in _questions():
        asked.cache_clear()


_without_bitsandbytes()
import peft  # noqa: E402
