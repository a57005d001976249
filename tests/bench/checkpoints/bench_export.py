"""How fast a checkpoint becomes a model in bf16, against reading and writing as many bytes; and in how much memory.

    python -m tests.bench.checkpoints.bench_export [--gigabytes 1] [--runs 7] [--folder DIR]

Exported are the weights of a state that two ranks saved: a third of its bytes is read (every one verified), half of
that is written, digested and flushed. Beside it, in the same rounds, with the page cache emptied and the output
flushed each time: DeepSpeed's zero_to_fp32 to bf16 safetensors, and torch's consolidation of distributed safetensors,
which keeps fp32. Each way has a process of its own, which is timed after its imports; memory is the highest that is
resident above what it was then, mapped files included. What each way is divided by is the reading of the bytes
that it must read and the writing of those that it must write, flushed, with nothing else done, in the same round.
Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.bench.checkpoints.state import STATES, WIDTH, cold, flush, raw_read, raw_write, save, tensors, timed
from tests.bench.common import busy, write_results

GOALS = {"time ÷ (read + write)": 1.3, "peak MiB": 256.0}
WORLD = 2
TAG = "ds"
_RESET_PEAK = "5"
"""Written to clear_refs, it makes the process's peak what is resident now (man 5 proc)."""


def ours(source: Path, to: Path) -> None:
    from finetune_api.spec import Precision
    from finetune_trainers.checkpoint.exports import ExportOptions, export_checkpoint
    from finetune_trainers.checkpoint.find import find_newest
    from finetune_trainers.checkpoint.storage.opening import open_storage

    storage = open_storage(f"file://{source}")
    manifest = find_newest(storage).manifest
    assert manifest is not None
    export_checkpoint(storage, manifest, str(to), "hf", ExportOptions(dtype=Precision.BF16))


def zero_to_fp32(source: Path, to: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    convert_zero_checkpoint_to_state_dict(str(source), str(to), dtype="bf16", safe_serialization=True, tag=TAG)
    flush(to)


def consolidate(source: Path, to: Path) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    to.mkdir()
    names = {f"layers.{number}.weight": 1 for number in range(int((source / "count").read_text()))}
    consolidate_safetensors_files(str(source), str(to), names)
    flush(to)


WAYS: dict[str, tuple[Callable[[Path, Path], None], str, int]] = {
    "ours": (ours, "finetune_trainers.checkpoint.exports.hugging_face", 2),
    "zero_to_fp32": (zero_to_fp32, "deepspeed.utils.zero_to_fp32", 2),
    "dcp": (consolidate, "torch.distributed.checkpoint", 4),
}
"""By name: what is done, what is imported before the clock starts, and bytes written for each parameter."""


def one_way(way: str, source: Path, to: Path) -> dict[str, float]:
    """In this process: seconds, and MiB above what was resident before."""
    act, module, _ = WAYS[way]
    __import__(module)
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    before = resident("VmHWM")
    seconds = timed(lambda: act(source, to))
    return {"seconds": seconds, "peak_mib": (resident("VmHWM") - before) / 1024}


def resident(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def prepare(folder: Path, num_bytes: int) -> dict[str, Path]:
    """The same parameters as each way wants them -> where they are."""
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    from finetune_trainers.checkpoint.commit import begin
    from finetune_trainers.checkpoint.storage.opening import open_storage
    from tests.bench.checkpoints.deepspeed_peer import Ranks

    of = tensors(num_bytes)
    storage = open_storage(f"file://{folder}/ours")
    fence, _ = begin(storage, "bench", datetime.now(UTC))
    save(storage, fence, 1, WORLD, of)
    with Ranks(WORLD, len(of), folder) as ranks:
        ranks("save", TAG)
    (folder / "zero").mkdir()
    (folder / TAG).rename(folder / "zero" / TAG)
    writer = HuggingFaceStorageWriter(str(folder / "dcp"), save_distributed=True)
    state = {tensor.name: torch.randn(WIDTH, WIDTH) for tensor in of}
    save_distributed(state, storage_writer=writer, no_dist=True)
    (folder / "dcp" / "count").write_text(str(len(of)))
    raw_write(folder, len(of) * WIDTH * WIDTH * 4)
    (folder / "raw").rename(folder / "parameters")
    return {"ours": folder / "ours", "zero_to_fp32": folder / "zero", "dcp": folder / "dcp"}


def measured(folder: Path, num_bytes: int, runs: int) -> dict[str, dict[str, list[float]]]:
    """All runs of all ways, by figure."""
    sources = prepare(folder, num_bytes)
    num_parameters = len(tensors(num_bytes)) * WIDTH * WIDTH
    found: dict[str, dict[str, list[float]]] = {way: {"seconds": [], "raw": [], "peak_mib": []} for way in WAYS}
    for number in range(runs):
        for way, (_, _, item) in WAYS.items():
            cold(folder)
            raw = timed(lambda: raw_read([folder / "parameters"]))
            raw += timed(lambda item=item: raw_write(folder, num_parameters * item))  # type: ignore[misc]
            cold(sources[way])
            answer = _in_a_process(way, sources[way], folder / f"out-{way}-{number}")
            found[way]["raw"].append(raw)
            for figure in ("seconds", "peak_mib"):
                found[way][figure].append(answer[figure])
    return found


def _in_a_process(way: str, source: Path, to: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.checkpoints.bench_export", "--way", way, str(source), str(to)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way} has failed:\n{done.stderr[-2000:]}")
    shutil.rmtree(to)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="fp32 masters and both moments together")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one when left out")
    parser.add_argument("--way", nargs=3, metavar=("WAY", "FROM", "TO"), help="one way, in this process")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one_way(options.way[0], Path(options.way[1]), Path(options.way[2]))))
        return 0
    load = busy()
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=options.folder) as name:
        found = measured(Path(name), int(options.gigabytes * 1e9), options.runs)
    ratios = {
        way: round(statistics.median(figures["seconds"]) / statistics.median(figures["raw"]), 3)
        for way, figures in found.items()
    }
    peaks = {way: round(statistics.median(figures["peak_mib"])) for way, figures in found.items()}
    for way in WAYS:
        print(f"{way}: {ratios[way]:.2f} × (read + write), {peaks[way]} MiB")
    results = {"load_before": load, "gigabytes": options.gigabytes, "states": len(STATES), "goals": GOALS}
    write_results("checkpoint_export", results | {"ratios": ratios, "peaks_mib": peaks, "runs": found})
    return int(ratios["ours"] > GOALS["time ÷ (read + write)"] or peaks["ours"] > GOALS["peak MiB"])


if __name__ == "__main__":
    sys.exit(main())
