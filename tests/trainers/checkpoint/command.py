"""`finetune ckpt` with both of its sides in this process, which starts sooner."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from finetune_client.cli import asking
from finetune_client.cli.app import app

__all__ = ["Ckpt", "Here"]


class Here:
    """The trainers' side in this process: what the command sees of a process."""

    def __init__(self, command: Sequence[str], request: str) -> None:
        program = import_module(f"{command[-1]}.__main__")
        self.stdout = io.StringIO()
        with redirect_stdout(self.stdout):
            self._code: int = program.main([request])
        self.stdout.seek(0)

    def wait(self) -> int:
        return self._code


class Ckpt:
    """Runs `finetune ckpt` with arguments, and remembers what its one side asked of the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        monkeypatch.setattr(asking, "start", self._start)

    def _start(self, command: Sequence[str], request: str) -> Here:
        self.asked.append(json.loads(request))
        return Here(command, request)

    def __call__(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["ckpt", *map(str, arguments)], prog_name="finetune")
