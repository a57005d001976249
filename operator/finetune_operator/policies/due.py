"""What the policies about time have in common: a moment, and what follows when it comes.

A policy that waits for something names the moment once. The reconcile pass compares it with the clock: it acts when the
moment has come, and looks again at that moment when it has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.failures import FailureClass

__all__ = ["Due"]


@dataclass(frozen=True)
class Due:
    """An attempt that goes on unchanged until `at` is ended then, for this reason."""

    at: datetime
    failure_class: FailureClass
    message: str
