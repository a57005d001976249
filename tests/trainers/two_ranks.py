"""Two processes of one gloo group on this machine, run to their end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_two_ranks"]


def run_two_ranks(module: str, folder: Path) -> None:
    """`python -m MODULE FOLDER` as rank 0 and as rank 1, one thread each. Both must end well."""
    group = {"WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(folder)],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
