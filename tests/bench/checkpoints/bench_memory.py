"""How much memory saving, verifying, restoring and exporting take, as the state grows.

    python -m tests.bench.checkpoints.bench_memory [--gigabytes 0.5 2 8] [--folder DIR]

Each act is a process of its own over a checkpoint of two ranks: what the ranks' writers do with slices that trainers
hold, a deep verification, one rank of three taking its part, an export to bf16. Memory is the highest that is resident
above what was after the imports; of a restore, above what it was asked to fill as well. The disk needs room for the
largest state and a sixth. Exit code 1 when any act takes more than 256 MiB, or at the largest state more than 32 MiB
above what it takes at the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from finetune_trainers.checkpoint.commit import begin
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.bench.checkpoints.bench_export import ours, resident
from tests.bench.checkpoints.state import restore, save, targets, tensors
from tests.bench.common import busy, write_results

GOALS = {"MiB": 256.0, "MiB more at the largest": 32.0}
_RESET_PEAK = "5"
_MIB = 1 << 20


def _storage(folder: Path) -> Storage:
    return open_storage(f"file://{folder}/run")


def _newest(folder: Path, deep: bool = False) -> Manifest:
    found = find_newest(_storage(folder), deep)
    assert found.manifest is not None
    assert not found.rejected
    return found.manifest


def _save(folder: Path, num_bytes: int) -> float:
    storage = _storage(folder)
    fence, _ = begin(storage, "bench", datetime.now(UTC))
    save(storage, fence, 1, 2, tensors(num_bytes))
    return 0.0


def _verify(folder: Path, num_bytes: int) -> float:
    _newest(folder, deep=True)
    return 0.0


def _restore(folder: Path, num_bytes: int) -> float:
    manifest = _newest(folder)
    memory = targets(manifest, 1, 3)
    restore(_storage(folder), manifest, [memory])
    return sum(map(len, memory.values())) / _MIB


def _export(folder: Path, num_bytes: int) -> float:
    ours(folder / "run", folder / "model")
    return 0.0


ACTS: dict[str, Callable[[Path, int], float]] = {
    "save": _save,
    "verify": _verify,
    "restore": _restore,
    "export": _export,
}
"""In order. Each says how many MiB it was asked to fill."""


def one_act(act: str, folder: Path, num_bytes: int) -> float:
    """In this process: MiB above what was resident before."""
    import finetune_trainers.checkpoint.exports.hugging_face  # noqa: F401  not what is measured

    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = resident("VmHWM")
    filled = ACTS[act](folder, num_bytes)
    return (resident("VmHWM") - before) / 1024 - filled


def _in_a_process(act: str, folder: Path, num_bytes: int) -> float:
    command = [sys.executable, "-m", "tests.bench.checkpoints.bench_memory", "--act", act, str(folder), str(num_bytes)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{act} has failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 2.0, 8.0], help="of state, rising")
    parser.add_argument("--folder", type=Path, help="on a disk with room; a temporary one when left out")
    parser.add_argument("--act", nargs=3, metavar=("ACT", "FOLDER", "BYTES"), help="one, in this process")
    options = parser.parse_args()
    if options.act:
        print(json.dumps(one_act(options.act[0], Path(options.act[1]), int(options.act[2]))))
        return 0
    load, found = busy(), {}
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=options.folder) as name:
            found[f"{gigabytes:g}"] = {
                act: round(_in_a_process(act, Path(name), int(gigabytes * 1e9)), 1) for act in ACTS
            }
        print(f"{gigabytes:g} GB: " + ", ".join(f"{act} {mib} MiB" for act, mib in found[f"{gigabytes:g}"].items()))
    write_results("checkpoint_memory", {"load_before": load, "goals": GOALS, "mib": found})
    first, *_, last = found.values()
    grown = max(last[act] - first[act] for act in ACTS)
    return int(max(last.values()) > GOALS["MiB"] or grown > GOALS["MiB more at the largest"])


if __name__ == "__main__":
    sys.exit(main())
