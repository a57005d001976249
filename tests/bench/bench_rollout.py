"""Tokens per second of rollouts, against transformers' `generate` with the same model, prompts and longest answer.

    python -m tests.bench.bench_rollout [--precision fp32 bf16] [--runs 3] [--rows 32] [--tokens 64]

Prompts of many lengths are asked several times each, as GRPO does. Answers end at a full stop or a line break too, so
that some are short and others are cut: where an answer ends is drawn by both sides from the same distribution, but not
with the same numbers, so each side's own tokens are counted. `generate` writes batches of the same size, sorted by
length, padded on the left; its padding is not counted. Sides alternate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.cpu_bf16 import bf16_is_emulated, use_float32_products
from finetune_trainers.rollout import Request, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from tests.bench.common import busy, model_folder, write_results

GOAL = 1.3
BATCH = 16
SAMPLES = 4
"""Answers to each prompt."""
SUBJECTS = ("a cat", "the sea", "an old house at the end of a long and quiet street", "two friends", "rain", "a clock")
TASKS = (
    "Name {}.",
    "Tell me in one sentence what is good about {}.",
    (
        "I am writing a letter to my sister, who lives far away and does not know anything about it yet. Describe {} to"
        " her so that she can see it, in a few friendly words, and do not forget to say why I like it so much."
    ),
)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Alone:
    """The part of WorkerContext that rollout uses, without a group."""

    rank, world_size, local_world_size, device = 0, 1, 1, torch.device("cpu")

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Questions as token ids, each SAMPLES times."""
    texts = [task.format(subject) for subject in SUBJECTS for task in TASKS]
    chosen = [texts[number % len(texts)] for number in range(count // SAMPLES)]
    asked = [[{"role": "user", "content": text}] for text in chosen for _ in range(SAMPLES)]
    return [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in asked]


def end_ids_of(tokenizer: Any) -> list[int]:
    return sorted({tokenizer.eos_token_id, *(tokenizer.encode(mark)[0] for mark in (".", "\n"))})


def ours(model: Any, asked: list[list[int]], end_ids: list[int], num_tokens: int, seed: int) -> int:
    """Tokens written."""
    engine = InProcessEngine(model, 0, end_ids, Alone(), batch_size=BATCH)  # type: ignore[arg-type]
    requests = [Request(prompt, seed + number) for number, prompt in enumerate(asked)]
    return sum(len(answer.ids) for answer in engine.generate(requests, Sampling(num_tokens)))


def theirs(model: Any, asked: list[list[int]], end_ids: list[int], num_tokens: int, seed: int) -> int:
    """Tokens written, padding left out."""
    torch.manual_seed(seed)
    settings = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end_ids,
        pad_token_id=0, use_cache=True,
    )  # fmt: skip
    by_length = sorted(asked, key=len)
    total = 0
    for start in range(0, len(by_length), BATCH):
        batch = by_length[start : start + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.no_grad():
            written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:]
        for row in written.tolist():
            ends = [place + 1 for place, token in enumerate(row) if token in end_ids]
            total += ends[0] if ends else len(row)
    return total


def measure(precision: str, num_rows: int, num_tokens: int, num_runs: int) -> dict[str, Any]:
    """Both sides in turn, `num_runs` times, after a short one that is not counted."""
    folder = model_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked, end_ids = prompts(tokenizer, num_rows), end_ids_of(tokenizer)
    models = {
        "ours": AutoModelForCausalLM.from_pretrained(
            folder, dtype=PRECISIONS[precision], attn_implementation=PACKED_ATTENTION
        ).eval(),
        "transformers": AutoModelForCausalLM.from_pretrained(folder, dtype=PRECISIONS[precision]).eval(),
    }
    if precision == "bf16" and bf16_is_emulated(torch.device("cpu")):
        for model in models.values():  # the same products on both sides: theirs would take minutes as they come
            use_float32_products(model)
    sides = {"ours": ours, "transformers": theirs}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(-1, num_runs):
        for side, write in sides.items():
            load, started = busy(), time.perf_counter()
            rows = asked if number >= 0 else asked[:SAMPLES]
            tokens = write(models[side], rows, end_ids, num_tokens if number >= 0 else 4, 1000 * (number + 1))
            seconds = time.perf_counter() - started
            if number >= 0:
                runs[side].append({"tokens": tokens, "seconds": round(seconds, 2), "load_before": load})
                print(
                    f"{precision} {side:<12} {tokens / seconds:7.1f} tokens/s of {tokens} (load before {load})",
                    flush=True,
                )
    medians = {side: statistics.median(run["tokens"] / run["seconds"] for run in these) for side, these in runs.items()}
    return {
        "precision": precision,
        "rows": num_rows,
        "longest_answer": num_tokens,
        "batch": BATCH,
        "runs": runs,
        "median_tokens_per_second": {side: round(rate, 1) for side, rate in medians.items()},
        "ratio": round(medians["ours"] / medians["transformers"], 2),
    }


def main() -> int:
    """0 when the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(PRECISIONS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    arguments = parser.parse_args()
    figures = [
        measure(precision, arguments.rows, arguments.tokens, arguments.runs) for precision in arguments.precision
    ]
    write_results("rollout", {"goal": GOAL, "figures": figures})
    for figure in figures:
        print(f"{figure['precision']}: {figure['ratio']}x transformers' generate (goal {GOAL}x)")
    return int(any(figure["ratio"] < GOAL for figure in figures))


if __name__ == "__main__":
    sys.exit(main())
