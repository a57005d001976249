"""Models beside the one that learns: a teacher, a reference, a judge. Each rank holds all of such a model.

While a policy under ZeRO-3 lives, transformers splits whatever model it makes, and only an engine puts it together
again. Models beside the policy have no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed as zero3_switch

__all__ = ["not_split"]


@contextmanager
def not_split() -> Iterator[None]:
    """What is loaded inside is whole, on every rank."""
    kept = zero3_switch._hf_deepspeed_config_weak_ref
    zero3_switch.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero3_switch._hf_deepspeed_config_weak_ref = kept
