"""One mistake of a person's, and what must be said of it. The three tables of this folder consist of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.failures import EXIT_CODES, FailureClass

__all__ = ["ABOUT_THE_DATA", "ABOUT_THE_JOB", "MANIFEST", "MODEL", "Row"]

ABOUT_THE_JOB = EXIT_CODES[FailureClass.USER_ERROR]
ABOUT_THE_DATA = EXIT_CODES[FailureClass.DATA_ERROR]
MANIFEST = "job.yaml"
MODEL = "model"
"""A folder with a good small model, where the mistake is one that only a look at model and data can find."""


@dataclass(frozen=True)
class Row:
    """A job that must not start, in a folder."""

    what: str
    """The mistake, in words."""
    write: Callable[[Path], None]
    """Puts the manifest, and what else the job needs, into the folder."""
    right: str
    """Part of the message: what would be right."""
    file: str = MANIFEST
    """Where the mistake is, below the folder, with its line."""
    path: str | None = None
    """The field of the job or of the row."""
    value: str | None = None
    """What stands there, as the message has it; None where nothing does. One that ends in … is only the beginning."""
    code: int = ABOUT_THE_JOB
    """Exit code."""
    found_by_looking: bool = False
    """The manifest is all right: it is the model or the data that is not, or not for this job."""
