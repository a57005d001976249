"""What import-linter's contracts in pyproject.toml cannot say: what is really loaded when checkpoints are handled."""

from __future__ import annotations

import subprocess
import sys


def test_the_protocol_needs_neither_ray_nor_torch_nor_a_bucket() -> None:
    modules = ", ".join(f"finetune_trainers.checkpoint.{name}" for name in ("commit", "find", "sweep", "reading"))
    code = f"import sys, {modules}; print({{'torch', 'ray', 'deepspeed', 'obstore', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
