"""`finetune ckpt` with both of its sides in this process, which starts sooner."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from finetune_client.cli.app import app
from finetune_client.cli.ckpt import asking
from finetune_trainers.checkpoint.admin.__main__ import main

__all__ = ["Ckpt", "Here"]


class Here:
    """The trainers' side in this process: what the command sees of a process."""

    def __init__(self, request: str) -> None:
        self.stdout = io.StringIO()
        with redirect_stdout(self.stdout):
            self._code = main([request])
        self.stdout.seek(0)

    def wait(self) -> int:
        return self._code


class Ckpt:
    """Runs `finetune ckpt` with arguments, and remembers what its one side asked of the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        monkeypatch.setattr(asking, "start", self._start)

    def _start(self, request: str) -> Here:
        self.asked.append(json.loads(request))
        return Here(request)

    def __call__(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["ckpt", *map(str, arguments)], prog_name="finetune")
