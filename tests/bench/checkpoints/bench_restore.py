"""How fast a checkpoint is restored, against reading its files with nothing else done; and by other world sizes.

    python -m tests.bench.checkpoints.bench_restore [--gigabytes 0.5] [--runs 7] [--folder DIR]

Restored is what a resume needs: fp32 masters and both of AdamW's moments, every byte verified. Beside it, in the same
rounds and with the page cache emptied each time: torch's distributed checkpoint of the same tensors, DeepSpeed's
load_checkpoint, and for other world sizes DeepSpeed's universal checkpoint (conversion, then load). Ranks of ours are
restored one after the other in one process, DeepSpeed's at once in a process each. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from finetune_trainers.checkpoint.commit import begin
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.bench.checkpoints.deepspeed_peer import Ranks, to_universal
from tests.bench.checkpoints.state import STATES, WIDTH, cold, raw_read, restore, save, targets, tensors, timed
from tests.bench.common import busy, write_results

GOALS = {"efficiency": 0.85, "amplification": 1.05, "reshard": 1.2, "times faster than the peer": 10.0}
RESHARDS = ((4, 2), (2, 4), (1, 3))


def same_world(folder: Path, num_bytes: int, runs: int) -> dict[str, list[float]]:
    """Seconds by way, in bytes that are the same for all but DeepSpeed, which saves the weights twice."""
    of = tensors(num_bytes)
    storage, manifest = _saved(folder / "ours", 1, num_bytes)
    memory = [targets(manifest, 0, 1)]
    state = {f"{tensor.name}.{name}": torch.randn(WIDTH, WIDTH) for tensor in of for name in STATES}
    dcp_save(state, checkpoint_id=folder / "dcp", no_dist=True)
    seconds: dict[str, list[float]] = {"raw read": [], "ours": [], "dcp": [], "deepspeed": []}
    with Ranks(1, len(of), folder) as ranks:
        ranks("save", "ds")
        for _ in range(runs):
            files = cold(folder / "ours")
            seconds["raw read"].append(timed(partial(raw_read, files)))
            cold(folder / "ours")
            seconds["ours"].append(timed(lambda: restore(storage, manifest, memory)))
            cold(folder / "dcp")
            seconds["dcp"].append(timed(lambda: dcp_load(state, checkpoint_id=folder / "dcp", no_dist=True)))
            cold(folder / "ds")
            seconds["deepspeed"].append(ranks("load", "ds").seconds)
    return seconds


def resharded(folder: Path, before: int, after: int, num_bytes: int, runs: int) -> dict[str, Any]:
    """Ours from one world size to another, beside the same world's; and DeepSpeed's way."""
    storage, manifest = _saved(folder / "ours", before, num_bytes)
    same = [targets(manifest, rank, before) for rank in range(before)]
    other = [targets(manifest, rank, after) for rank in range(after)]
    seconds: dict[str, Any] = {"same world": [], "other world": [], "universal": []}
    for _ in range(runs):
        cold(folder / "ours")
        seconds["same world"].append(timed(lambda: restore(storage, manifest, same)))
        cold(folder / "ours")
        seconds["other world"].append(timed(lambda: restore(storage, manifest, other)))
    read, needed = restore(storage, manifest, other)
    with Ranks(before, len(tensors(num_bytes)), folder) as ranks:
        ranks("save", "ds")
    with Ranks(after, len(tensors(num_bytes)), folder, universal=True) as ranks:
        for _ in range(max(1, runs // 3)):
            cold(folder / "ds")
            converting = to_universal(folder, "ds")
            cold(folder / "ds_universal")
            loaded = ranks("load", "ds_universal")
            seconds["universal"].append({"convert": converting, "load": loaded.seconds, "bytes": loaded.bytes_read})
    ours = statistics.median(seconds["other world"])
    peer = statistics.median(one["convert"] + one["load"] for one in seconds["universal"])
    return {
        "seconds": seconds,
        "amplification": round(read / needed, 4),
        "reshard": round(ours / statistics.median(seconds["same world"]), 3),
        "times faster than the peer": round(peer / ours, 1),
        "peer amplification": round(statistics.median(one["bytes"] for one in seconds["universal"]) / needed, 2),
    }


def _saved(folder: Path, world: int, num_bytes: int) -> tuple[Storage, Manifest]:
    storage = open_storage(f"file://{folder}")
    fence, _ = begin(storage, "bench", datetime.now(UTC))
    return storage, save(storage, fence, 1, world, tensors(num_bytes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="fp32 masters and both moments together")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one when left out")
    options = parser.parse_args()
    load, num_bytes = busy(), int(options.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(prefix="bench-restore-", dir=options.folder) as name:
        seconds = same_world(Path(name), num_bytes, options.runs)
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    efficiency = {way: round(medians["raw read"] / medians[way], 3) for way in ("ours", "dcp", "deepspeed")}
    print("restore bytes/s ÷ raw read: " + ", ".join(f"{way} {value:.2f}" for way, value in efficiency.items()))
    missed = efficiency["ours"] < GOALS["efficiency"]
    reshards: dict[str, Any] = {}
    for before, after in RESHARDS:
        with tempfile.TemporaryDirectory(prefix="bench-reshard-", dir=options.folder) as name:
            found = resharded(Path(name), before, after, num_bytes, options.runs)
        reshards[f"{before} -> {after}"] = found
        print(
            f"{before} -> {after}: {found['reshard']:.2f} of the same world's time, {found['amplification']:.3f} bytes"
            f" read per byte needed (universal {found['peer amplification']:.1f});"
            f" {found['times faster than the peer']:.0f} times faster than convert and load"
        )
        missed |= found["amplification"] > GOALS["amplification"] or found["reshard"] > GOALS["reshard"]
        missed |= found["times faster than the peer"] < GOALS["times faster than the peer"]
    results = {"load_before": load, "gigabytes": options.gigabytes, "goals": GOALS, "efficiency": efficiency}
    write_results("checkpoint_restore", results | {"seconds": seconds, "reshards": reshards})
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
