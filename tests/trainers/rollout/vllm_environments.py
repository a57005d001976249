"""Interpreters with vLLM for tests: one that has the stand-in, and the real one where somebody asks for it.

The real one is that of ROLLOUT_VLLM_PYTHON, or else the one that vllm_env.sh makes; it takes a minute to start, and two
cores while it does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from finetune_trainers.rollout.vllm_process import VARIABLE

__all__ = ["real_python", "stand_in_python"]

HERE = Path(__file__).parent


def real_python() -> str:
    named = os.environ.get(VARIABLE)
    if named:
        return named
    made = subprocess.run([HERE / "vllm_env.sh"], stdout=subprocess.PIPE, text=True, check=True)
    return made.stdout.strip()


def stand_in_python(folder: Path) -> str:
    """An environment at `folder` with all that ours has, and the stand-in."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "both.pth").write_text(f"{HERE / 'stand_in'}\n{sysconfig.get_path('purelib')}\n")
    (folder / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.symlink_to(Path(sys.base_prefix) / "bin" / version)
    return str(python)
