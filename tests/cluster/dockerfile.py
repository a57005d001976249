"""What the builder of images has to know of a Dockerfile: its arguments, and how a container of it is started.

Only the instructions of our own two are understood, and another one is an error: what is built without Docker must not
drift from what Docker would build. Called by tests.cluster.images.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Dockerfile", "read_dockerfile"]

_DONE_BY_THE_BUILDER = {"FROM", "RUN", "COPY", "WORKDIR"}


@dataclass(frozen=True)
class Dockerfile:
    """`arguments` of all stages with their defaults; the rest is what the last stage says of its containers."""

    arguments: dict[str, str]
    environment: dict[str, str]
    labels: dict[str, str]
    user: str
    command: list[str]

    def words(self, argument: str) -> list[str]:
        """An argument that is a list, such as PACKAGES."""
        return shlex.split(self.arguments[argument])


def read_dockerfile(path: Path) -> Dockerfile:
    """Raises ValueError, with the line, for an instruction that is not known here."""
    arguments: dict[str, str] = {}
    environment: dict[str, str] = {}
    labels: dict[str, str] = {}
    user, command = "", list[str]()
    for line in _instructions(path.read_text(encoding="utf-8")):
        instruction, _, rest = line.partition(" ")
        if instruction == "ARG":
            arguments |= _pairs(rest)
        elif instruction == "ENV":
            environment |= _pairs(rest)
        elif instruction == "LABEL":
            labels |= _pairs(rest)
        elif instruction == "USER":
            user = rest
        elif instruction == "CMD":
            command = json.loads(rest)
        elif instruction not in _DONE_BY_THE_BUILDER:
            raise ValueError(f"{path}: {line!r} is not understood by the builder of images")
        if instruction == "FROM":  # a stage begins with nothing of the one before
            environment, labels, user, command = {}, {}, "", []
    return Dockerfile(arguments, environment, labels, user, command)


def _instructions(text: str) -> list[str]:
    """One line each, without comments."""
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def _pairs(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(text))
