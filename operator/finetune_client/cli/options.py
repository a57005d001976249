"""Options that several commands share. Imports nothing that takes time."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["Output", "OutputOption"]


class Output(StrEnum):
    """For people, or for programs."""

    TEXT = "text"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="text for people, json for programs (on stdout).")]
