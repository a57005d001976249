"""What is said to be pure imports nothing that reads, writes, or needs a cluster."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finetune_trainers.checkpoint

FOLDER = Path(finetune_trainers.checkpoint.__file__).parent
PURE = (
    "assembly",
    "documents",
    "exports.precision",
    "identity",
    "layout",
    "manifest",
    "retention",
    "safetensors_file",
    "shards",
    "slices",
)
HERE = {"folders", "staging", "flushes", "writer", "orphans"}
"""What works on this machine's own memory, processes and folders, and reaches checkpoints through a storage only."""
ALLOWED = {"blake3", "pydantic", "finetune_api", "finetune_trainers"}
ALLOWED |= {"__future__", "bisect", "collections", "dataclasses", "functools", "hashlib", "itertools", "json", "math"}
ALLOWED |= {"numpy", "re", "typing"}


def imported(module: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_imports_nothing_that_has_effects(module: str) -> None:
    names = imported(module)
    assert {name.partition(".")[0] for name in names} <= ALLOWED
    ours = {name for name in names if name.startswith("finetune_trainers.")}
    pure = {"finetune_trainers.checkpoint", *(f"finetune_trainers.checkpoint.{other}" for other in PURE)}
    assert ours <= pure


def test_the_protocol_needs_neither_ray_nor_torch_nor_a_bucket() -> None:
    modules = ", ".join(f"finetune_trainers.checkpoint.{name}" for name in ("commit", "find", "sweep", "reading"))
    code = f"import sys, {modules}; print({{'torch', 'ray', 'deepspeed', 'obstore', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_only_the_storage_folder_touches_disks_and_buckets() -> None:
    effects = {"os", "pathlib", "shutil", "obstore", "tempfile", "io", "socket", "fcntl", "ctypes"}
    for file in FOLDER.glob("*.py"):
        if file.stem in HERE:
            continue
        assert not {name.partition(".")[0] for name in imported(file.stem)} & effects, file.name
