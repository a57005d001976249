"""`finetune export` and `finetune chat`: what one does with a trained model. The trainers do the work."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune_api.failures import INTERRUPTED
from finetune_api.progress import Artifact
from finetune_client import runner
from finetune_client.cli.exits import INVALID, OK
from finetune_client.cli.sizes import size

__all__ = ["FoundArtifact", "chat", "export", "find_artifact"]


@dataclass(frozen=True)
class FoundArtifact:
    """A trained model on this machine's disk."""

    folder: Path
    is_adapter: bool

    @property
    def option(self) -> list[str]:
        """How the trainers' command line names it."""
        return ["--adapter" if self.is_adapter else "--model", str(self.folder)]


def find_artifact(folder: Path) -> FoundArtifact:
    """The artifact in `folder`, which may be a run's folder or the artifact itself. Raises ValueError."""
    for candidate in (folder / "artifact", folder):
        if (candidate / "adapter_config.json").is_file():
            return FoundArtifact(candidate, is_adapter=True)
        if (candidate / "config.json").is_file():
            return FoundArtifact(candidate, is_adapter=False)
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; name a run's folder, such as runs/my-job/20250101-120000")
    if (folder / "plan.json").is_file():
        raise ValueError(f"{folder} is the folder of a run that has written no artifact; see its trainer.log")
    raise ValueError(f"{folder} holds neither an artifact (adapter_config.json or config.json) nor a run")


def export(source: Path, to: Path, merge: bool, dtype: str | None, as_json: bool) -> int:
    """Write the artifact somewhere else, merged and converted if asked. Returns the exit code."""
    try:
        artifact = find_artifact(source)
        if merge and not artifact.is_adapter:
            raise ValueError(f"{artifact.folder} is a whole model, there is nothing to merge; leave --merge out")
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise ValueError(f"{to} is not empty; name a new folder for --to")
    except ValueError as error:
        return _refuse(str(error), _as_document(None) if as_json else None)
    options = ["--to", str(to), *(["--merge"] if merge else []), *(["--dtype", dtype] if dtype else [])]
    code, printed = _call(["export", *artifact.option, *options], capture=True)
    written = Artifact.model_validate_json(printed.splitlines()[-1]) if code == OK else None
    if as_json:
        _print(_as_document(written))
    elif written is not None:
        print(f"Written to {to} ({written.kind}, {size(written.bytes)})")
    return code


def chat(source: Path, prompt: str, compare_base: bool, max_new_tokens: int, as_json: bool) -> int:
    """Let the model answer a prompt, beside the base model if asked. Returns the exit code.

    As JSON: {"prompt", "tuned", "base"}; no answer, or one that was not asked for, is null.
    """
    nothing = {"prompt": prompt, "tuned": None, "base": None}
    try:
        artifact = find_artifact(source)
    except ValueError as error:
        return _refuse(str(error), nothing if as_json else None)
    options = ["--prompt", prompt, *(["--compare-base"] if compare_base else [])]
    options += ["--max-new-tokens", str(max_new_tokens), *(["--json"] if as_json else [])]
    code, printed = _call(["chat", *artifact.option, *options], capture=as_json)
    if as_json:
        _print(json.loads(printed.splitlines()[-1]) if code == OK else nothing)
    return code


def _call(arguments: Sequence[str], capture: bool = False) -> tuple[int, str]:
    """The exit code of the trainers' command, and what it printed if captured. On stderr it speaks for itself."""
    if missing := runner.missing_packages():
        Console(stderr=True).print(
            f"this needs packages that are not installed ({', '.join(missing)}); "
            "install the trainers extra: pip install 'finetune-operator[trainers]'",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return INVALID, ""
    stdout = subprocess.PIPE if capture else None
    try:
        # In our own process group: Ctrl-C reaches it as it reaches us.
        done = subprocess.run(
            [*runner.TRAINERS, *arguments], check=False, stdin=subprocess.DEVNULL, stdout=stdout, text=True
        )
    except KeyboardInterrupt:
        return INTERRUPTED, ""
    code = INTERRUPTED if done.returncode == -signal.SIGINT else done.returncode
    return (code if code >= 0 else 1), done.stdout or ""


def _as_document(artifact: Artifact | None) -> dict[str, str | int | None]:
    if artifact is None:
        return {"artifact": None, "kind": None, "digest": None, "bytes": None}
    return {"artifact": artifact.uri, "kind": artifact.kind, "digest": artifact.digest, "bytes": artifact.bytes}


def _refuse(message: str, document: Mapping[str, Any] | None) -> int:
    """One sentence for people, and for programs a document of nulls."""
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
    if document is not None:
        _print(document)
    return INVALID


def _print(document: Mapping[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))
