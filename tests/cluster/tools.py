"""Programs that a person would type: the real kubectl and Helm, run to their end."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Tool", "ToolFailed", "helm_tool", "kubectl_tool"]

_SECONDS = 120


class ToolFailed(Exception):
    """It ended with another code than 0; `stderr` is what it said."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr
        super().__init__(f"{' '.join(map(str, done.args))}: exit code {done.returncode}\n{done.stderr}{done.stdout}")


@dataclass(frozen=True)
class Tool:
    """One program with an environment of its own: it sees no configuration of the person who runs the tests."""

    program: Path
    environment: dict[str, str]

    def __call__(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """What it prints. Raises ToolFailed when it fails."""
        done = self.run(*arguments, stdin=stdin)
        if done.returncode:
            raise ToolFailed(done)
        return done.stdout

    def run(self, *arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """The same for those who want to see it fail. Without `stdin` it reads nothing."""
        return subprocess.run(
            [self.program, *arguments],
            input=stdin or "",
            env={"PATH": os.environ.get("PATH", ""), **self.environment},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )


def kubectl_tool(program: Path, kubeconfig: Path, folder: Path) -> Tool:
    """kubectl, talking to the server of `kubeconfig`; its caches go below `folder`."""
    return Tool(program, {"KUBECONFIG": str(kubeconfig), "HOME": str(folder), "KUBECACHEDIR": str(folder / "cache")})


def helm_tool(program: Path, kubeconfig: Path, folder: Path) -> Tool:
    """Helm, likewise. It knows no repositories and no plugins."""
    homes = {f"HELM_{kind}_HOME": str(folder / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    return Tool(program, {"KUBECONFIG": str(kubeconfig), "HOME": str(folder), **homes})
