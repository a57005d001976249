"""How the memory of full-parameter ZeRO-3 workers falls from one worker to two, against what the formula says.

    python -m tests.bench.bench_zero3_memory [--runs 3]

With Ψ parameters in fp32, a worker of W holds 20 Ψ / W bytes: its part of the parameters (4), of the master copy that
DeepSpeed's optimizer updates (4), of the gradients (4) and of Adam's two moments (8). Rajbhandari et al. 2019 (arXiv
1910.02054, section 3) count 16 for mixed precision: 2 + 2 + 4 + 8. What else a worker holds (the interpreter,
libraries, activations of a micro-batch of fixed size, the parameters gathered for one layer) does not depend on W and
cancels out of the difference of two peaks, which is what is compared: 10 Ψ bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from finetune_operator.planning import plan_run
from tests.bench.common import busy, cache_folder, model_folder, write_results
from tests.bench.sft_runs import write_rows
from tests.factories import job

BYTES_PER_PARAMETER = 20
TOLERANCE = 0.15
STEPS = 3


def run(workers: int, rows: Path, folder: Path) -> tuple[list[int], int]:
    """Peak resident bytes of each worker of one run, and the model's number of parameters."""
    plan = plan_run(
        job(
            {
                "model.source": f"file://{model_folder()}",
                "data.train": [{"source": f"file://{rows}"}],
                "data.eval": [],
                "method.sft": {"maxSeqLength": 128, "longRows": "truncate"},
                "tuning": {"full": {}},
                "training": {
                    "maxSteps": STEPS,
                    "globalBatchSize": workers,
                    "microBatchSize": 1,
                    "learningRate": 1e-5,
                    "precision": "fp32",
                },
                "deepspeed.zeroStage": 3,
                "cluster": {"workers": {"replicas": workers, "cpus": 1}},
            }
        )
    )
    folder.mkdir()
    (folder / "given.json").write_text(plan.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "finetune_trainers", "run", "--ray", "--plan", str(folder / "given.json")]
    environment = os.environ | {"FINETUNE_CACHE": str(cache_folder()), "OMP_NUM_THREADS": "1"}
    with (folder / "process.log").open("wb") as log:
        process = subprocess.Popen([*command, "--workdir", str(folder)], stdout=log, stderr=log, env=environment)
        peaks = _peaks_until_the_end(process)
    if process.returncode:
        tail = "\n".join((folder / "trainer.log").read_text(errors="replace").splitlines()[-20:])
        sys.exit(f"the run with {workers} workers ended with {process.returncode}:\n{tail}")
    parameters = json.loads((folder / "prepared.json").read_text())["model"]["numParameters"]
    return sorted(peaks.values(), reverse=True)[:workers], parameters


def _peaks_until_the_end(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """The kernel's own high-water mark of each Ray worker, by process; the training ones are the largest."""
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for child in _children(process.pid):
            try:
                if child.name().startswith("ray::"):
                    peaks[child.pid] = max(peaks.get(child.pid, 0), _high_water_mark(child.pid))
            except (psutil.Error, OSError):
                continue  # gone in between
        time.sleep(0.1)
    return peaks


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _high_water_mark(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    num_runs, load, parameters = parser.parse_args().runs, busy(), 0
    peaks: dict[int, list[list[int]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="bench-zero3-") as name:
        rows = write_rows(Path(name, "rows.jsonl"), 50)
        for number in range(num_runs):
            for workers, seen in peaks.items():
                found, parameters = run(workers, rows, Path(name, f"{workers}-{number}"))
                seen.append(found)
                print(f"{workers} workers: {[round(peak / 1e6) for peak in found]} MB", flush=True)
    largest = {workers: statistics.median(max(found) for found in seen) for workers, seen in peaks.items()}
    fall = largest[1] - largest[2]
    formula = BYTES_PER_PARAMETER * parameters * (1 - 1 / 2)
    results = {"load_before": load, "parameters": parameters, "peak_bytes": peaks, "fall_bytes": fall}
    write_results("zero3_memory", results | {"formula_bytes": formula, "ratio": round(fall / formula, 3)})
    print(f"from 1 to 2 workers: {fall / 1e6:.0f} MB less each; formula {formula / 1e6:.0f} MB: {fall / formula:.2f}")
    return int(abs(fall / formula - 1) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
